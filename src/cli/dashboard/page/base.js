// What every part of the page uses: elements, units, and where the figures come from. Text from outside is only ever set
// as text, never as HTML.
"use strict";

// In a report the figures are in the page; else this program is asked.
const embedded = (() => {
  const element = document.getElementById("data");
  return element ? JSON.parse(element.textContent) : null;
})();

const byId = (id) => document.getElementById(id);

function build(element, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined) element.append(child);
  }
  return element;
}

const html = (tag, properties, ...children) => build(document.createElement(tag), properties, children);
const svg = (tag, properties, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);

function show(id, ...children) {
  byId(id).replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
}

// Units

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function bytes(count) {
  if (!isNumber(count)) return "–";
  const units = [[2 ** 40, "TiB", 2], [2 ** 30, "GiB", 2], [2 ** 20, "MiB", 1], [2 ** 10, "KiB", 1]];
  for (const [size, unit, digits] of units) {
    if (Math.abs(count) >= size) return `${(count / size).toFixed(digits)} ${unit}`;
  }
  return `${count} B`;
}

function decimal(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && size < 0.01) return value.toExponential(1);
  if (size < 10) return value.toFixed(2);
  if (size < 100) return value.toFixed(1);
  return whole(Math.round(value));
}

// Thin spaces between thousands.
const whole = (value) => (isNumber(value) ? String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, "\u202f") : "–");

const percent = (part, all) => (all > 0 ? `${((100 * part) / all).toFixed(1)} %` : "–");

function span(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 120) return `${seconds.toFixed(0)} s`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(0)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(1)} d`;
}

function billions(count) {
  if (!isNumber(count)) return "–";
  return count >= 1e9 ? `${(count / 1e9).toFixed(2)} billion` : `${(count / 1e6).toFixed(0)} million`;
}

// Tables: columns are [title, is it a number]; a row is a list of strings and elements.
function table(caption, columns, rows) {
  const cell = (tag, index, content) => html(tag, { class: columns[index][1] ? "number" : null }, content);
  const head = columns.map(([title], index) => {
    const th = cell("th", index, title);
    th.setAttribute("scope", "col");
    return th;
  });
  const body = rows.map((row) => html("tr", {}, row.map((content, index) => cell("td", index, content))));
  return html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    html("table", {}, html("caption", { class: "hidden" }, caption), html("thead", {}, html("tr", {}, head)), html("tbody", {}, body)));
}

const details = (summary, ...children) => html("details", {}, html("summary", {}, summary), children);
const message = (text, kind) => html("p", { class: `message ${kind || ""}` }, text);

function tiles(list) {
  return html("dl", { class: "tiles" }, list.map(([name, value, note]) =>
    html("div", {}, html("dt", {}, name), html("dd", {}, value), note ? html("dd", { class: "note" }, note) : null)));
}

// Asking

class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// The error that a command prints with --json, where the answer is one.
function checked(answer) {
  if (answer && answer.error) throw new Refusal(answer.error.status, answer.error.message);
  return answer;
}

async function ask(path, settings, method) {
  const query = new URLSearchParams(settings || {}).toString();
  let response;
  try {
    response = await fetch(query ? `${path}?${query}` : path, { method: method || "GET" });
  } catch {
    throw new Refusal("GONE", "flea dashboard does not answer any more; was it ended?");
  }
  const text = await response.text();
  let answer;
  try {
    answer = JSON.parse(text);
  } catch {
    throw new Refusal("HTTP", text.trim() || `HTTP status ${response.status}`);
  }
  return checked(answer);
}

const analysisOf = async (settings) =>
  embedded ? checked(embedded.analyses[settings.model]) : ask("api/analyze", settings);

// As a shell would have to read it.
const quoted = (word) => (/^[\w./:+@%,=-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
