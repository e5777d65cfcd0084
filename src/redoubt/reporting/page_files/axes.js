// Scales, ticks and the frame of a chart.

const COLOURS = 7;
const colour = (i) => `var(--c${i % COLOURS})`;
const DASHES = [null, "7 4", "2 4", "9 3 2 3"];
const dash = (i) => DASHES[Math.floor(i / COLOURS) % DASHES.length];

/** Ticks at 1, 2 or 5 times a power of ten. */
function linearTicks(low, high, about) {
  const rough = (high - low) / about, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

/** Ticks at powers of ten, or at 1, 2 and 5 times them where these are few. */
function logTicks(low, high) {
  const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
  const heads = to - from > 2 ? [1] : [1, 2, 5];
  const all = Array.from({ length: to - from + 1 }, (_, i) => heads.map((h) => Number((h * 10 ** (from + i)).toPrecision(12)))).flat();
  return all.filter((t) => t >= low * 0.999 && t <= high * 1.001);
}

/** Maps values to pixels; on a logarithmic scale zero stands at the left end. */
function scaleOf(values, from, to, { log = false, range = null, about = 5, pad = 0 } = {}) {
  let [low, high] = range ?? [Math.min(...values), Math.max(...values)];
  const positive = values.filter((v) => v > 0);
  if (log && positive.length) {
    const least = Math.min(...positive), zero = low <= 0, edge = zero ? least / 3 : least;
    const place = (v) => (Math.log(Math.max(v, edge) / edge) / Math.log(high / edge)) * (to - from) + from;
    return Object.assign(place, { ticks: [...(zero ? [0] : []), ...logTicks(least, high)] });
  }
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  if (!range) [low, high] = [low - pad * (high - low), high + pad * (high - low)];
  const place = (v) => ((v - low) / (high - low)) * (to - from) + from;
  return Object.assign(place, { ticks: linearTicks(low, high, about) });
}

/** An empty chart with axes; `area` is [left, top, right, bottom] in pixels. */
function frame({ width, height, area, x, y, xLabel, yLabel, name }) {
  const [left, top, right, bottom] = area;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: "group", "aria-label": name });
  for (const t of y.ticks) {
    root.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(t), y2: y(t) }));
    root.append(label(t, left - 7, y(t) + 4, "end"));
  }
  for (const t of x.ticks) {
    root.append(svg("line", { class: "axis", x1: x(t), x2: x(t), y1: bottom, y2: bottom + 4 }), label(t, x(t), bottom + 18));
  }
  root.append(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  root.append(label(xLabel, (left + right) / 2, height - 4), label(yLabel, 0, 11, "start"));
  return root;
}

const label = (text, x, y, anchor = "middle") => svg("text", { x, y, "text-anchor": anchor }, String(text));

/** A marker of one of six shapes around a point. */
function marker(x, y, shape, attributes) {
  const s = 5, corners = (n, turn) => Array.from({ length: n }, (_, i) => {
    const angle = turn + (2 * Math.PI * i) / n;
    return `${(x + 1.3 * s * Math.cos(angle)).toFixed(1)},${(y + 1.3 * s * Math.sin(angle)).toFixed(1)}`;
  }).join(" ");
  if (shape === 0) return svg("circle", { cx: x, cy: y, r: s, ...attributes });
  const [n, turn] = [[4, Math.PI / 4], [3, -Math.PI / 2], [4, 0], [3, Math.PI / 2], [5, -Math.PI / 2]][(shape - 1) % 5];
  return svg("polygon", { points: corners(n, turn), ...attributes });
}

/** Shows a point's text at the pointer, or by arrow keys at the focus; Enter and a click open it. */
function explore(root, points, { reach = 30 } = {}) {
  const tip = el("div", { className: "tip", hidden: true, role: "status" });
  const ring = svg("circle", { class: "ring", r: 8, visibility: "hidden" });
  root.append(ring);
  let at = -1;
  const show = (i) => {
    at = i;
    tip.hidden = i < 0;
    ring.setAttribute("visibility", i < 0 ? "hidden" : "visible");
    if (i < 0) return;
    const p = points[i], width = root.clientWidth || Infinity;
    ring.setAttribute("cx", p.x);
    ring.setAttribute("cy", p.y);
    tip.textContent = p.text;
    tip.style.top = `${p.y + 14}px`;
    tip.style.left = p.x < width / 2 ? `${p.x + 10}px` : "auto";
    tip.style.right = p.x < width / 2 ? "auto" : `${width - p.x + 10}px`;
  };
  const nearest = (event) => {
    const box = root.getBoundingClientRect(), [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const far = points.map((p) => Math.hypot(p.x - x, p.y - y)), least = Math.min(...far);
    return least < reach ? far.indexOf(least) : -1;
  };
  root.addEventListener("pointermove", (event) => show(nearest(event)));
  root.addEventListener("pointerleave", () => show(-1));
  root.addEventListener("blur", () => show(-1));
  root.addEventListener("click", (event) => points[nearest(event)]?.open?.());
  root.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step && points.length) show((at + step + points.length) % points.length);
    else if (event.key === "Enter") points[at]?.open?.();
    else if (event.key === "Escape") show(-1);
    else return;
    event.preventDefault();
  });
  return el("div", { className: "plot" }, root, tip);
}
