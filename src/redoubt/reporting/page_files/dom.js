// Elements: text goes in as text, never as markup.

const byId = (id) => document.getElementById(id);

/** An element with properties, `on...` listeners, attributes (with a dash, or `role`) and children. */
function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (value == null) continue;
    if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((c) => c != null));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) if (value != null) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** A select's options, [value, text]; what was chosen stays chosen where it is still there. */
function fill(select, options, chosen = select.value) {
  select.replaceChildren(...options.map(([value, text]) => el("option", { value, textContent: text })));
  if (options.some(([value]) => String(value) === String(chosen))) select.value = chosen;
}

/** A table of rows of texts or nodes; `numbers` are the columns to be aligned right. */
function tableOf(head, rows, numbers = [], className = "") {
  const cell = (tag) => (content, i) => el(tag, { className: numbers.includes(i) ? "number" : "" }, content ?? MISSING);
  const header = el("thead", {}, el("tr", {}, ...head.map(cell("th"))));
  const body = el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell("td")))));
  return el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": head.join(", ") },
    el("table", { className }, header, body));
}

const drawings = new Map();
const resized = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const drawing = drawings.get(target);
    if (drawing && Math.abs(drawing.width - contentRect.width) > 1) redraw(target);
  }
});

/** Lets `make(width)` draw into a box, now and whenever its width changes. */
function draw(box, make) {
  drawings.set(box, { make, width: 0 });
  resized.observe(box);
  redraw(box);
}

function redraw(box) {
  const drawing = drawings.get(box), width = box.clientWidth;
  if (!width) return;
  drawing.width = width;
  box.replaceChildren(...[drawing.make(width)].flat());
}
