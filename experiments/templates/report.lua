-- A pandoc filter. In report.md a caption is a paragraph of its own, above a table and below a
-- figure: "**Table 3. Title.** Text". Here it becomes the caption of that table or figure.

local PAPER_WIDTH = 105  -- characters of the size in header.tex beside each other on a page
local TEXT_WIDTH = 60    -- a longer text in a cell is broken into lines

local function is_caption(block, word)
  if not block or block.t ~= "Para" or block.content[1].t ~= "Strong" then
    return false
  end
  return pandoc.utils.stringify(block.content[1]):match("^" .. word .. " %d+%.") ~= nil
end

local function is_image(block)
  return block.t == "Para" and #block.content == 1 and block.content[1].t == "Image"
end

-- HTML: the figure scrolls sideways where the window is too narrow, also by keyboard.
local function make_figure(content, caption, class)
  local scroll = pandoc.Attr("", {"scroll"}, {role = "region", tabindex = "0"})
  scroll.attributes["aria-label"] = pandoc.utils.stringify(caption.content[1])
  if FORMAT == "html" then
    content = pandoc.Div(content, scroll)
  end
  return pandoc.Figure(content, {pandoc.Plain(caption.content)}, pandoc.Attr("", {class}))
end

-- LaTeX: a table that is wider than the page gets columns of fixed width, whose cells are broken at
-- spaces. A column of numbers is as wide as its longest word, one of text as its longest cell.
local function fit_on_paper(tbl)
  local rows = tbl.head.rows
  for _, body in ipairs(tbl.bodies) do
    rows = rows .. body.body
  end

  local widths, natural_width, total = {}, 0, 0
  for i, colspec in ipairs(tbl.colspecs) do
    local longest_cell, longest_word = 0, 0
    for _, row in ipairs(rows) do
      local text = pandoc.utils.stringify(row.cells[i].contents)
      longest_cell = math.max(longest_cell, utf8.len(text))
      for word in text:gmatch("%S+") do
        longest_word = math.max(longest_word, utf8.len(word))
      end
    end
    local is_number = colspec[1] == "AlignRight"
    widths[i] = 2 + (is_number and longest_word or math.min(longest_cell, TEXT_WIDTH))
    natural_width = natural_width + 2 + longest_cell
    total = total + widths[i]
  end

  if natural_width > PAPER_WIDTH then
    for i, colspec in ipairs(tbl.colspecs) do
      tbl.colspecs[i] = {colspec[1], widths[i] / total}
    end
  end
  return tbl
end

local function make_table(tbl, caption)
  if FORMAT == "html" then
    return make_figure(tbl, caption, "table")
  end
  tbl = fit_on_paper(tbl)
  tbl.caption = {long = {pandoc.Plain(caption.content)}}
  return tbl
end

function Blocks(blocks)
  local result = pandoc.List()
  local i = 1
  while i <= #blocks do
    local block, next_block = blocks[i], blocks[i + 1]
    if is_caption(block, "Table") and next_block and next_block.t == "Table" then
      result:insert(make_table(next_block, block))
      i = i + 2
    elseif is_image(block) and is_caption(next_block, "Figure") then
      result:insert(make_figure(block, next_block, "picture"))
      i = i + 2
    else
      result:insert(block)
      i = i + 1
    end
  end
  return result
end
