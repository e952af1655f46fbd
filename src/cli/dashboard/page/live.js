// A running flead: what its models hold and read, as `flea-ctl status --json` and `flea-ctl stats --json` say, again and
// again while the page is looked at.
"use strict";

const LIVE_EVERY_MS = 2000;

let before = null;

// Growth of a counter of a model since the snapshot before, for each second.
function rateOf(model, name) {
  if (!before || before.generation[model.id] === undefined) return null;
  const earlier = before.models[model.id][name];
  const seconds = (Date.now() - before.at) / 1000;
  return seconds > 0 && model[name] >= earlier ? (model[name] - earlier) / seconds : null;
}

function budgetBar(status) {
  const parts = [{ name: "held by pools", bytes: status.pool_bytes, kind: "decoder" }];
  const marks = [
    { name: `budget ${bytes(status.budget_bytes)}`, bytes: status.budget_bytes },
    { name: `planned ${bytes(status.planned_bytes)}`, bytes: status.planned_bytes },
  ];
  return stackedBar(`Pools hold ${bytes(status.pool_bytes)} of a budget of ${bytes(status.budget_bytes)}`, parts, marks);
}

function residencyBar(model) {
  const streamed = model.streamed_bytes_per_pass;
  const parts = [
    { name: "resident", bytes: model.resident_bytes, kind: "decoder" },
    { name: "streamed", bytes: streamed, kind: "kv_full" },
    // Embeddings, mostly: rows of them are read by the host.
    { name: "not in the pool", bytes: Math.max(model.model_bytes - model.resident_bytes - streamed, 0), kind: "streaming" },
  ].filter((part) => part.bytes > 0);
  const words = `${percent(model.resident_bytes, model.model_bytes)} of ${bytes(model.model_bytes)} is resident, ${bytes(streamed)} are streamed for each pass`;
  return stackedBar(words, parts, [{ name: `pool ${bytes(model.pool_bytes)}`, bytes: model.pool_bytes }]);
}

function modelCard(model) {
  const rate = rateOf(model, "bytes_read_total");
  const stalls = rateOf(model, "stalls_total");
  const acquires = rateOf(model, "acquires_total");
  const average = model.read_ns_total > 0 ? `${(model.bytes_read_total / model.read_ns_total).toFixed(2)} GB/s while reading` : null;
  const hits = model.acquires_total > 0 ? percent(model.acquires_total - model.stalls_total, model.acquires_total) : "–";
  return html("article", { class: "model" },
    html("h3", {}, `${model.path.split("/").pop()} `, html("span", { class: `badge ${model.state === "ready" ? "resident" : "streamed"}` }, model.state + (model.pinned ? ", pinned" : ""))),
    html("p", { class: "note" }, `${model.path}: ${model.architecture}, ${model.layers} layers, ${bytes(model.model_bytes)}, ${model.reader} ${model.direct_io ? "direct" : "buffered"}, ` +
      `${model.clients} ${model.clients === 1 ? "client" : "clients"}, weight ${model.weight}`),
    residencyBar(model),
    tiles([
      ["Resident", percent(model.resident_bytes, model.model_bytes), bytes(model.resident_bytes)],
      ["Read now", rate === null ? "–" : `${decimal(rate / 1e6)} MB/s`, average],
      ["Read for each pass", bytes(model.streamed_bytes_per_pass), `${bytes(model.bytes_read_total)} since it was loaded`],
      ["Acquires without a wait", hits, acquires === null ? `${whole(model.acquires_total)} in all` : `${decimal(acquires)} a second, ${decimal(stalls)} waited`],
      ["Slots", `${model.slots_used} of ${model.slots_count} used`, model.slots_quarantined > 0 ? `${model.slots_quarantined} lost` : `${bytes(model.ring_bytes)} in all`],
    ]),
    model.fallbacks.length > 0 ? message(`It does not run as wished: ${model.fallbacks.join(", ")}`) : null);
}

function showLive(status, stats) {
  const pressure = status.pressure ? `memory ${status.pressure.state}, ${bytes(status.pressure.available_bytes)} available` : "memory pressure is not watched";
  const heldDown = status.budget_bytes < status.budget_configured_bytes ? `, held down from ${bytes(status.budget_configured_bytes)}` : "";
  byId("live-from").textContent =
    `flead ${status.version} (pid ${status.pid}) at ${status.socket}, up ${span(status.uptime_seconds)}; ${status.connections} ${status.connections === 1 ? "connection" : "connections"}; ${pressure}.`;
  const clients = stats.clients || [];
  show("live-body",
    html("h3", {}, `Pools: ${bytes(status.pool_bytes)} of ${bytes(status.budget_bytes)}${heldDown}`), budgetBar(status),
    stats.models.length === 0 ? message("No model is loaded.") : stats.models.map(modelCard),
    clients.length === 0 ? message("No client is attached.") : table("Clients of flead",
      [["client", true], ["pid", true], ["name"], ["model", true], ["attached", true], ["leases", true], ["layer", true], ["acquires", true]],
      clients.map((client) => [whole(client.id), String(client.pid), client.name, whole(client.model), span(client.attached_seconds), whole(client.leases),
        client.layer === null ? "–" : String(client.layer), whole(client.acquires_total)])));
  before = { at: Date.now(), generation: {}, models: {} };
  for (const model of stats.models) {
    before.generation[model.id] = model.generation;
    before.models[model.id] = model;
  }
}

function showNoDaemon(page, refusal) {
  before = null;
  const gone = refusal.status === "GONE";
  byId("live-from").textContent = gone ? refusal.message : `No flead answers at ${page.socket}.`;
  show("live-body", gone ? null : message(refusal.message), gone ? null : html("p", { class: "note" },
    "The rest of this page needs none. As soon as one runs there it is shown here."));
}

async function pollLive(page) {
  if (document.visibilityState === "visible") {
    try {
      const status = await ask("api/status");
      showLive(status, await ask("api/stats"));
    } catch (refusal) {
      showNoDaemon(page, refusal);
    }
  }
  setTimeout(() => pollLive(page), LIVE_EVERY_MS);
}

function startLive(page) {
  if (!embedded) return pollLive(page);
  byId("live-title").textContent = "flead, when this report was made";
  try {
    showLive(checked(embedded.status), checked(embedded.stats));
  } catch (refusal) {
    showNoDaemon(page, refusal);
  }
  return Promise.resolve();
}
