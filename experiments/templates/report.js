// Sortable tables: each column head becomes a button; aria-sort tells the order. Gaps always come last.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const valueOf = (row, i, isNumber) => {
    const cell = row.cells[i];
    if (!isNumber) return cell.textContent === "–" ? null : cell.textContent;
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  const sort = (i) => {
    const isNumber = heads[i].classList.contains("number");
    const sign = heads[i].getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const compare = (a, b) => isNumber ? a - b : a.localeCompare(b, "en", {numeric: true});
    const rows = [...body.rows].map((row) => [valueOf(row, i, isNumber), row]);
    rows.sort(([a], [b]) => (a === null) - (b === null) || (a === null ? 0 : sign * compare(a, b)));
    body.append(...rows.map(([, row]) => row));
    for (const head of heads) head.removeAttribute("aria-sort");
    heads[i].setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  };
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Sort by this column";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(i));
    head.append(button);
  });
}
