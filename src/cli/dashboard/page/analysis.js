// What `flea analyze --json` says: memory by component, verdicts by device, and every model beside the others.
"use strict";

const VERDICTS = {
  resident: ["●", "resident", "everything is in memory"],
  rows: ["◕", "rows", "tables of rows stay on the drive"],
  streamed: ["◑", "streamed", "layers are read for every token"],
  infeasible: ["○", "infeasible", "it does not run"],
};
const COMPONENTS = {
  decoder: "layers",
  embedding: "embedding",
  head: "head",
  per_layer_tables: "per-layer tables",
  kv_full: "keys and values",
  kv_windowed: "windowed keys and values",
  kv_ring: "keys and values in memory",
  state: "states",
  encoder: "encoder",
  activations: "activations",
  runtime: "program",
};

function badge(verdict) {
  const [sign, name, meaning] = VERDICTS[verdict] || ["?", String(verdict), ""];
  return html("span", { class: `badge ${verdict}`, title: meaning }, html("span", { "aria-hidden": "true" }, sign), ` ${name}`);
}

const kindOf = (part) => (part.name in COMPONENTS ? part.name : "other");
// An encoder says itself which it is.
const nameOf = (part) => (part.name === "encoder" ? part.what.split(",")[0] : COMPONENTS[part.name] || part.name);
const sumOf = (report, names) =>
  report.components.filter((part) => names.includes(part.name)).reduce((sum, part) => sum + part.bytes, 0);

function showMemory(report) {
  const weights = sumOf(report, ["decoder", "embedding", "head", "per_layer_tables", "encoder"]);
  const kv = sumOf(report, ["kv_full", "kv_windowed", "kv_ring"]);
  const stored = report.weight_bits === null ? "weights as in the file" : `weights at ${report.weight_bits} bits`;
  byId("memory-lead").textContent =
    `${report.name}: ${billions(report.geometry.parameters.text)} parameters in ${report.geometry.layers} layers of width ` +
    `${report.geometry.hidden}; ${stored}, keys and values ${report.kv_type}. From ${report.origin}.`;
  const most = report.context_max_count ? `of at most ${whole(report.context_max_count)} tokens` : "tokens";
  const devices = report.devices.map((device) => ({ name: `${device.name}: ${bytes(device.memory_bytes)}`, bytes: device.memory_bytes }));
  // A device many times as large would leave no room for the parts.
  const marks = devices.filter((device) => device.bytes <= 1.6 * report.total_bytes);
  const parts = report.components.map((part) => ({ name: nameOf(part), bytes: part.bytes, kind: kindOf(part) }));
  const rows = report.components.map((part) => [
    html("span", { class: "key" }, html("span", { class: `swatch ${kindOf(part)}`, "aria-hidden": "true" }), nameOf(part)),
    bytes(part.bytes),
    percent(part.bytes, report.total_bytes),
    part.what,
  ]);
  rows.push([html("strong", {}, "total"), html("strong", {}, bytes(report.total_bytes)), "100 %", ""]);
  show("memory-body",
    tiles([
      ["All of it in memory", bytes(report.total_bytes)],
      ["Weights", bytes(weights), percent(weights, report.total_bytes)],
      ["Keys and values", bytes(kv), percent(kv, report.total_bytes)],
      ["Context", whole(report.context_count), most],
    ]),
    stackedBar(`Memory of ${report.name}: ${parts.map((part) => `${part.name} ${bytes(part.bytes)}`).join(", ")}`, parts, marks),
    table("Memory by component", [["component"], ["size", true], ["share", true], ["what it is"]], rows));
}

function showDevices(report) {
  const most = Math.max(...report.devices.flatMap((device) => [device.memory_bytes, device.need_bytes]));
  const rows = report.devices.map((device) => {
    const runs = device.verdict !== "infeasible";
    const left = runs ? `${bytes(device.headroom_bytes)} left` : `${bytes(device.missing_bytes)} missing`;
    const read = device.streamed_bytes_per_token > 0 ? `${bytes(device.streamed_bytes_per_token)} read for each` : null;
    const experts = device.whole_layers_tokens_per_second;
    return [
      html("div", {}, html("strong", {}, device.name), html("div", { class: "note" }, device.label),
        device.command ? html("code", { class: "command" }, device.command) : null),
      badge(device.verdict),
      html("div", {}, needBar(device.need_bytes, device.memory_bytes, most, device.verdict),
        html("div", { class: "note" }, `${bytes(device.need_bytes)} of ${bytes(device.memory_bytes)}, ${left}`)),
      html("div", {}, runs ? decimal(device.tokens_per_second) : "–", read ? html("div", { class: "note" }, read) : null,
        isNumber(experts) ? html("div", { class: "note" }, `${decimal(experts)} by whole layers, as through the daemon`) : null),
      html("div", {}, device.largest_context_count === null ? "–" : whole(device.largest_context_count),
        device.largest_resident_context_count === null ? null
          : html("div", { class: "note" }, `${whole(device.largest_resident_context_count)} resident`)),
    ];
  });
  const count = (verdict) => report.devices.filter((device) => device.verdict === verdict).length;
  const said = Object.keys(VERDICTS).filter((verdict) => count(verdict) > 0).map((verdict) => `${count(verdict)} ${verdict}`);
  byId("devices-lead").textContent =
    `${report.name} with ${whole(report.context_count)} tokens of context: ${said.join(", ")}. Tokens/s are what the drive or the memory ` +
    `allows` + (report.devices.some((device) => device.plan) ? ", with the computing that a profile knows." : "; computing is left out.");
  show("devices-body",
    table("Verdict by device", [["device, and what to type there"], ["verdict"], ["needs, of its memory"], ["tokens/s", true], ["largest context", true]], rows),
    html("ul", { class: "legend" }, Object.entries(VERDICTS).map(([verdict, [, , meaning]]) => html("li", {}, badge(verdict), ` ${meaning}`))));
}

function matrixCell(device) {
  if (!device) return "–";
  const note = device.verdict === "infeasible" ? `${bytes(device.missing_bytes)} missing`
    : isNumber(device.tokens_per_second) ? `${decimal(device.tokens_per_second)} tokens/s` : `needs ${bytes(device.need_bytes)}`;
  return html("div", {}, badge(device.verdict), html("div", { class: "note" }, note));
}

// `answers`: [model, report or refusal], in the order of the models.
function showModels(answers) {
  const first = answers.map(([, report]) => report).find((report) => report.devices);
  const devices = first ? first.devices : [];
  const rows = answers.map(([model, report]) => {
    const name = html("div", {}, html("strong", {}, model.name), html("div", { class: "note" }, report.devices ? bytes(report.total_bytes) : ""));
    if (!report.devices) return [name, html("span", { class: "note" }, report.message), ...devices.slice(1).map(() => "")];
    return [name, ...devices.map((device) => matrixCell(report.devices.find((own) => own.name === device.name)))];
  });
  show("models-body", table("Verdict of every model on every device",
    [["model, all in memory"], ...(first ? devices.map((device) => [`${device.name}, ${bytes(device.memory_bytes)}`]) : [["why not"]])], rows));
}

// The command with the same answer.
function analyzeCommand(page, settings) {
  const place = page.devices.find((device) => device.name === settings.device);
  const words = ["flea", "analyze", settings.model];
  for (const name of ["context", "weight-bits", "kv-type", "strip"]) {
    if (settings[name]) words.push(`--${name}`, settings[name]);
  }
  return [...words, ...(place ? place.options : []), "--json"].map(quoted).join(" ");
}

let analysisCount = 0;

// Asks anew; an answer that comes after a newer question is dropped.
async function analyze(page, settings) {
  const mine = ++analysisCount;
  const error = byId("analysis-error");
  byId("analyze-command").textContent = analyzeCommand(page, settings);
  if (!embedded) byId("save").href = `report.html?${new URLSearchParams(settings)}`;
  document.body.classList.add("asking");
  try {
    const report = await analysisOf(settings);
    if (mine !== analysisCount) return;
    error.hidden = true;
    showMemory(report);
    showDevices(report);
  } catch (refusal) {
    if (mine !== analysisCount) return;
    error.textContent = refusal.message;
    error.hidden = false;
    // No figures are better than those of another question.
    for (const id of ["memory-lead", "devices-lead"]) byId(id).textContent = "";
    for (const id of ["memory-body", "devices-body"]) show(id);
  }
  const answers = [];
  for (const model of page.models) {
    const asked = { ...settings, model: model.name };
    const answer = await analysisOf(asked).catch((refusal) => refusal);
    if (mine !== analysisCount) return;
    answers.push([model, answer]);
  }
  showModels(answers);
  document.body.classList.remove("asking");
}
