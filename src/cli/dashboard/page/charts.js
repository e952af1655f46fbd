// Plots as SVG: stacked bars, lines over two axes, bars on a logarithmic scale. Colours are classes of the style sheet, so
// that they follow light and dark; series are told apart by marks and words as well.
"use strict";

const MARKS = {
  circle: (x, y) => svg("circle", { cx: x, cy: y, r: 4 }),
  square: (x, y) => svg("rect", { x: x - 3.6, y: y - 3.6, width: 7.2, height: 7.2 }),
  triangle: (x, y) => svg("path", { d: `M${x} ${y - 5}l5 8.6h-10z` }),
  diamond: (x, y) => svg("path", { d: `M${x} ${y - 5.5}l5 5.5l-5 5.5l-5-5.5z` }),
  down: (x, y) => svg("path", { d: `M${x} ${y + 5}l5-8.6h-10z` }),
  cross: (x, y) => svg("path", { class: "open", d: `M${x - 4} ${y - 4}l8 8m0-8l-8 8` }),
  plus: (x, y) => svg("path", { class: "open", d: `M${x - 5} ${y}h10m-5-5v10` }),
  bar: (x, y) => svg("rect", { x: x - 5, y: y - 2, width: 10, height: 4 }),
};
const MARK_NAMES = Object.keys(MARKS);

// Round numbers from low to high, about so many.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const list = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) list.push(index * step);
  return list;
}

const shortNumber = (value) => String(Number(value.toPrecision(6)));

// One bar of parts [{name, bytes, kind}], with marks [{name, bytes}] above it.
function stackedBar(label, parts, marks) {
  const [width, line, height] = [1000, 16, 46];
  const total = parts.reduce((sum, part) => sum + part.bytes, 0);
  const most = Math.max(total, ...marks.map((mark) => mark.bytes)) || 1;
  const scale = (count) => (count / most) * width;
  const labels = placed(marks.map((mark) => ({ name: mark.name, x: scale(mark.bytes) })), width);
  const top = 6 + line * Math.max(0, ...labels.map((mark) => mark.line + 1));
  const drawing = svg("svg", { viewBox: `-4 0 ${width + 8} ${top + height + 26}`, role: "img", class: "bar", "aria-label": label });
  let at = 0;
  for (const part of parts) {
    const [x, wide] = [scale(at), scale(part.bytes)];
    drawing.append(svg("rect", { x, y: top, width: Math.max(wide, 0.5), height, class: `part ${part.kind}` },
      svg("title", {}, `${part.name}: ${bytes(part.bytes)}, ${percent(part.bytes, total)}`)));
    if (wide > Math.max(9 * part.name.length, 76)) {
      drawing.append(svg("text", { x: x + wide / 2, y: top + 20, class: "inside" }, part.name));
      drawing.append(svg("text", { x: x + wide / 2, y: top + 37, class: "inside small" }, bytes(part.bytes)));
    }
    at += part.bytes;
  }
  for (const mark of labels) {
    const y = top - 9 - line * mark.line;
    drawing.append(svg("path", { d: `M${mark.x} ${y - 8}V${top + height}`, class: "mark" }));
    drawing.append(svg("text", { x: mark.left ? mark.x - 5 : mark.x + 5, y, class: mark.left ? "note end" : "note" }, mark.name));
  }
  const unit = most >= 2 ** 29 ? [2 ** 30, "GiB"] : [2 ** 20, "MiB"];
  for (const value of ticks(0, most / unit[0], 8)) {
    const x = scale(value * unit[0]);
    const anchor = x < 20 ? "" : x > width - 25 ? "end" : "middle";
    drawing.append(svg("path", { d: `M${x} ${top + height}v5`, class: "axis" }));
    drawing.append(svg("text", { x, y: top + height + 19, class: `tick ${anchor}` }, `${shortNumber(value)} ${unit[1]}`));
  }
  return drawing;
}

// Labels beside their marks, each in the lowest line in which none lies on another.
function placed(marks, width) {
  const ends = [];
  return marks.sort((a, b) => a.x - b.x).map((mark) => {
    const wide = 6.6 * mark.name.length + 16;
    const left = mark.x + wide > width;
    const start = left ? mark.x - wide : mark.x;
    let line = 0;
    while (ends[line] > start) line++;
    ends[line] = start + wide;
    return { ...mark, line, left };
  });
}

// What is needed against what there is, on a scale that all such bars share.
function needBar(need, memory, most, kind) {
  const [width, height] = [220, 22];
  const scale = (count) => (count / (most || 1)) * width;
  return svg("svg", { viewBox: `-1 0 ${width + 2} ${height}`, class: "need", role: "img", "aria-label": `needs ${bytes(need)} of ${bytes(memory)}` },
    svg("rect", { x: 0, y: 3, width: scale(memory), height: 16, class: "have" }),
    svg("rect", { x: 0, y: 7, width: scale(need), height: 8, class: `part ${kind}` }),
    svg("path", { d: `M${scale(memory)} 0V${height}`, class: "mark" }));
}

// Lines: {title, x, y, series: [{name, points: [[x, y, words]], bound}]}. `index` of a series picks its colour and mark.
function linePlot({ title, x: xLabel, y: yLabel, series }) {
  const [width, height, left, right, top, bottom] = [560, 360, 56, 14, 12, 46];
  const points = series.flatMap((line) => line.points);
  if (points.length === 0) return message("There are no points to draw.");
  const range = (index) => {
    const values = points.map((point) => point[index]);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const room = (high - low || 1) * 0.05;
    return [low - room, high + room];
  };
  const [[x0, x1], [y0, y1]] = [range(0), range(1)];
  const across = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
  const up = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "plot", "aria-label": `${title}. ${yLabel} against ${xLabel}.` });
  for (const value of ticks(x0, x1, 8)) {
    drawing.append(svg("path", { d: `M${across(value)} ${top}V${height - bottom}`, class: "grid" }));
    drawing.append(svg("text", { x: across(value), y: height - bottom + 17, class: "tick middle" }, shortNumber(value)));
  }
  for (const value of ticks(y0, y1, 7)) {
    drawing.append(svg("path", { d: `M${left} ${up(value)}H${width - right}`, class: "grid" }));
    drawing.append(svg("text", { x: left - 7, y: up(value) + 4, class: "tick end" }, shortNumber(value)));
  }
  drawing.append(svg("path", { d: `M${left} ${top}V${height - bottom}H${width - right}`, class: "axis" }));
  drawing.append(svg("text", { x: (left + width - right) / 2, y: height - 8, class: "label middle" }, xLabel));
  drawing.append(svg("text", { x: 14, y: (top + height - bottom) / 2, class: "label middle", transform: `rotate(-90 14 ${(top + height - bottom) / 2})` }, yLabel));
  for (const line of series) {
    const path = line.points.map(([x, y], index) => `${index ? "L" : "M"}${across(x).toFixed(1)} ${up(y).toFixed(1)}`).join("");
    const group = svg("g", { class: line.bound ? "bound" : `series s${line.index}` }, svg("path", { d: path, class: "line" }));
    if (!line.bound) {
      for (const [x, y, words] of line.points) {
        const mark = MARKS[MARK_NAMES[line.index % MARK_NAMES.length]](across(x), up(y));
        mark.append(svg("title", {}, words));
        group.append(mark);
      }
    }
    drawing.append(group);
  }
  return html("figure", {}, html("figcaption", {}, title), drawing);
}

function legend(series) {
  const sample = (line) => {
    const drawing = svg("svg", { viewBox: "0 0 28 14", class: "sample", "aria-hidden": "true" });
    const group = svg("g", { class: line.bound ? "bound" : `series s${line.index}` }, svg("path", { d: "M1 7H27", class: "line" }));
    if (!line.bound) group.append(MARKS[MARK_NAMES[line.index % MARK_NAMES.length]](14, 7));
    drawing.append(group);
    return drawing;
  };
  return html("ul", { class: "legend" }, series.map((line) => html("li", {}, sample(line), line.name)));
}

// Bars on a logarithmic scale: groups of [{name, bars: [{name, value, index, words}]}].
function logBars(title, unit, groups) {
  const [width, left, right, row, gap] = [1000, 150, 210, 20, 16];
  const values = groups.flatMap((group) => group.bars.map((bar) => bar.value)).filter((value) => value > 0);
  if (values.length === 0) return message("There are no figures to draw.");
  const low = Math.floor(Math.log10(Math.min(...values)) - 0.3);
  const high = Math.max(Math.ceil(Math.log10(Math.max(...values))), low + 1);
  const across = (value) => left + ((Math.log10(Math.max(value, 10 ** low)) - low) / (high - low)) * (width - left - right);
  const height = groups.reduce((sum, group) => sum + group.bars.length * row + gap, 0) + 34;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "plot", "aria-label": `${title}, ${unit}, logarithmic` });
  for (let power = low; power <= high; power++) {
    const x = across(10 ** power);
    drawing.append(svg("path", { d: `M${x} 4V${height - 30}`, class: "grid" }));
    drawing.append(svg("text", { x, y: height - 14, class: "tick middle" }, power >= 0 ? whole(10 ** power) : String(10 ** power)));
  }
  drawing.append(svg("text", { x: width - right + 60, y: height - 14, class: "label" }, unit));
  let y = 8;
  for (const group of groups) {
    drawing.append(svg("text", { x: left - 12, y: y + (group.bars.length * row) / 2 + 4, class: "label end" }, group.name));
    for (const bar of group.bars) {
      drawing.append(svg("rect", { x: left, y: y + 2, width: Math.max(across(bar.value) - left, 1), height: row - 4, class: `series s${bar.index}` },
        svg("title", {}, bar.words)));
      drawing.append(svg("text", { x: across(bar.value) + 6, y: y + 14, class: "note" }, bar.words));
      y += row;
    }
    y += gap;
  }
  return html("figure", {}, html("figcaption", {}, title), drawing);
}
