-- A pandoc filter. In report.md a caption is a paragraph of its own, above a table and below a
-- figure: "**Table 3. Title.** Text". Here it becomes the caption of that table or figure.

-- In characters of the size that header.tex gives to tables:
local PAPER_WIDTH = 132  -- what fits on a line of the page
local TEXT_WIDTH = 60    -- a longer text in a cell is broken into lines
local GAP = 2            -- between two columns

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

-- The longest word and the longest text in a column of some rows, in characters.
local function measure(rows, column)
  local word_width = 0
  local text_width = 0
  for _, row in ipairs(rows) do
    local text = pandoc.utils.stringify(row.cells[column].contents)
    text_width = math.max(text_width, utf8.len(text))
    for word in text:gmatch("%S+") do
      word_width = math.max(word_width, utf8.len(word))
    end
  end
  return word_width, text_width
end

-- LaTeX: a table that is wider than the page gets columns of fixed width, in which the texts of its
-- head are broken at spaces. Where that is not enough, "1.84 ± 0.04" is broken too.
local function fit_on_paper(tbl)
  local rows = pandoc.List()
  for _, body in ipairs(tbl.bodies) do
    rows:extend(body.body)
  end

  local natural = 0  -- width of the table without any line break
  local whole = {}   -- widths of the columns with line breaks in the head
  local broken = {}  -- widths of the columns with line breaks in the head and between numbers
  local whole_sum = 0
  local broken_sum = 0
  for i, colspec in ipairs(tbl.colspecs) do
    local head_word, head_text = measure(tbl.head.rows, i)
    local body_word, body_text = measure(rows, i)
    natural = natural + GAP + math.max(head_text, body_text)
    whole[i] = GAP + math.max(head_word, math.min(body_text, TEXT_WIDTH))
    broken[i] = whole[i]
    if colspec[1] == "AlignRight" then
      broken[i] = GAP + math.max(head_word, body_word)
    end
    whole_sum = whole_sum + whole[i]
    broken_sum = broken_sum + broken[i]
  end

  if natural > PAPER_WIDTH then
    local widths = whole
    local sum = whole_sum
    if whole_sum > PAPER_WIDTH then
      widths = broken
      sum = broken_sum
    end
    for i, colspec in ipairs(tbl.colspecs) do
      tbl.colspecs[i] = {colspec[1], widths[i] / sum}
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
    local block = blocks[i]
    local next_block = blocks[i + 1]
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
