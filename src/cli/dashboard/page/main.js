// Begins: what there is to choose from, and what happens when something else is chosen.
"use strict";

const controls = byId("controls");

function option(value, text, chosen) {
  return html("option", { value, selected: value === chosen }, text);
}

function fillControls(page, settings) {
  const { elements } = controls;
  const group = (title, models) => models.length === 0 ? null : html("optgroup", { label: title },
    models.map((model) => option(model.name, model.name, settings.model)));
  elements.model.replaceChildren(...[group("Given", page.models.filter((model) => model.given)),
    group("Known", page.models.filter((model) => !model.given))].filter(Boolean));
  elements.device.replaceChildren(...page.devices.map((device) => option(device.name, `${device.name}: ${device.label}`, settings.device || "all")));
  for (const name of ["context", "weight-bits", "kv-type"]) elements[name].value = settings[name] || "";
  elements.strip.checked = Boolean(settings.strip);
  elements.strip.value = page.strip_all;
  const list = (id, values) => show(id, values.map((value) => html("option", { value })));
  list("contexts", ["4096", "8192", "16384", "32768", "65536", "131072"]);
  list("bits", ["2", "3", "4", "4.5", "6", "8", "16", "q4_K", "q6_K"]);
  list("kv-types", ["f16", "q8_0", "q4_0", "tq:4", "tq:3", "tq-ec:4", "tq-ec:3", "tcq:3"]);
}

// What empty fields mean, and which fields the model has a use for.
function explainControls(page) {
  const { elements } = controls;
  const model = page.models.find((one) => one.name === elements.model.value);
  elements.context.placeholder = model.context_max_count ? `≤ ${model.context_max_count}` : "";
  elements["weight-bits"].placeholder = model.filed ? "as in the file" : String(page.weight_bits_default);
  elements["kv-type"].placeholder = "f16";
  elements.strip.disabled = Boolean(embedded) || model.encoders.length === 0;
}

function chosen() {
  const { elements } = controls;
  const settings = { model: elements.model.value, device: elements.device.value };
  for (const name of ["context", "weight-bits", "kv-type"]) settings[name] = elements[name].value.trim();
  settings.strip = elements.strip.checked ? elements.strip.value : "";
  return settings;
}

function startControls(page) {
  const settings = embedded ? embedded.settings : page.first;
  fillControls(page, settings);
  explainControls(page);
  if (embedded) {
    // Only the model was not decided when the report was made.
    for (const element of controls.elements) element.disabled = element.name !== "model";
    byId("save").remove();
  }
  const ask = () => {
    explainControls(page);
    return analyze(page, chosen());
  };
  controls.addEventListener("change", ask);
  controls.addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  return ask();
}

async function start() {
  const page = embedded ? embedded.page : await ask("api/page");
  byId("about").textContent = embedded
    ? `flea ${page.version}, report of ${embedded.made}`
    : `flea ${page.version}: what models need, where they run, and what runs now`;
  byId("foot").textContent = embedded
    ? "Made by `flea dashboard`. All figures are in this file; it asks nobody."
    : "This page comes from `flea dashboard` on this machine and asks nobody else.";
  await Promise.all([startControls(page), startMeasured(page), startLive(page)]);
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  byId("analysis-error").textContent = error.message;
  byId("analysis-error").hidden = false;
});
