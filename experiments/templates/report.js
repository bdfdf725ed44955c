// Tables that can be sorted by a click on the head of a column. Gaps (–) always come last.
"use strict";

// "7.25 ± 0.12" and "−1.50 ± 0.25" → 7.25 and -1.5; what is no number is compared as text.
function readCell(cell, isNumber) {
  const text = cell.textContent;
  if (text === "–") return null;
  return isNumber ? Number.parseFloat(text.replaceAll(",", "").replace("−", "-")) : text;
}

function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", {numeric: true}));
}

function sortTable(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const isNumber = heads[column].style.textAlign === "right";
  const sign = heads[column].getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const rows = [...table.tBodies[0].rows].map((row) => [readCell(row.cells[column], isNumber), row]);
  rows.sort(([a], [b]) => compare(a, b, sign));
  table.tBodies[0].append(...rows.map(([, row]) => row));
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
}

for (const table of document.querySelectorAll("table")) {
  for (const row of table.tBodies[0].rows) {
    const name = row.cells[0].textContent;
    const isMarked = name.endsWith("(oversubscribed)") || name.endsWith("(short of CPU)");
    if (isMarked) row.classList.add("marked");
  }

  const heads = [...table.tHead.rows[0].cells];
  const hasNumbers = heads.some((head) => head.style.textAlign === "right");
  if (!hasNumbers || table.tBodies[0].rows.length < 2) continue;
  table.classList.add("sortable");
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Sort by this column";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortTable(table, column));
    head.append(button);
  });
}
