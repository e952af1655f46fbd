// What measurements say: `flea kv bench`, `flea kv compare` and `flea probe rows`, and the buttons that begin them.
"use strict";

// A codec has one colour and mark wherever it is drawn.
const CODECS = ["q8_0", "q4_0", "tq", "tq-ec", "tcq", "rotor", "spectral", "dh013"];
const codecOf = (cell) => cell.codec.split(":")[0];
const bitsOf = (cell) => cell.stored_bits + cell.side_bits;

// The cells of each codec in the order of their bits; one that fell back to another codec is not its own.
function seriesOf(cells, y) {
  const names = [...new Set(cells.map(codecOf))].sort((a, b) => CODECS.indexOf(a) - CODECS.indexOf(b));
  const lines = names.map((name) => ({
    name,
    index: CODECS.includes(name) ? CODECS.indexOf(name) : CODECS.length,
    points: cells
      .filter((cell) => codecOf(cell) === name && !cell.fallback)
      .map((cell) => [bitsOf(cell), y(cell), `${cell.codec}: ${bitsOf(cell).toFixed(2)} bits, ${decimal(y(cell))}`])
      .filter(([x, value]) => isNumber(x) && isNumber(value))
      .sort((a, b) => a[0] - b[0]),
  }));
  return lines.filter((line) => line.points.length > 0);
}

function qualityPlots(cells) {
  const decibel = (ratio) => 10 * Math.log10(ratio);
  const quality = seriesOf(cells, (cell) => -decibel(cell.nmse));
  const most = Math.max(1, ...cells.map(bitsOf));
  const least = Math.min(1, ...cells.map(bitsOf));
  const bound = (bits) => [bits, decibel(4) * bits, ""];
  const limit = { name: "bound of a Gaussian", bound: true, points: [bound(least), bound(most)] };
  const distance = seriesOf(cells, (cell) => decibel(cell.over_bound));
  const zero = { name: limit.name, bound: true, points: [[least, 0, ""], [most, 0, ""]] };
  return html("div", {},
    legend([...quality, limit]),
    html("div", { class: "pair" },
      linePlot({ title: "Quality (higher is better)", x: "stored bits for each value, with everything", y: "signal to error, dB", series: [...quality, limit] }),
      linePlot({ title: "Distance to the bound (lower is better)", x: "stored bits for each value, with everything", y: "dB above 4^-bits", series: [...distance, zero] })));
}

function cellTable(caption, cells) {
  const note = (cell) => {
    if (cell.fallback) return `is ${cell.fallback.codec}: a basis gains ${decimal(cell.fallback.gain_bits)} bits`;
    return cell.side_bits > 0 ? `${cell.side_bits.toFixed(3)} of the bits are calibration` : "";
  };
  return table(caption,
    [["codec"], ["bits", true], ["of 16", true], ["nmse", true], ["cosine", true], ["× bound", true], ["encode GB/s", true], ["decode GB/s", true], [""]],
    cells.map((cell) => [cell.codec, bitsOf(cell).toFixed(3), `${cell.ratio_to_16_bits.toFixed(2)}×`, cell.nmse.toExponential(3), cell.cosine.toFixed(5),
      cell.over_bound.toFixed(3), decimal(cell.encode_gb_per_second), decimal(cell.decode_gb_per_second), note(cell)]));
}

// One row for each rate of the baseline, one column for each codec: its best that stores no more bits.
function gainTable(gains) {
  if (!gains || gains.length === 0) return null;
  const caption = "How many times less error than dh013, from no more bits";
  const bases = [...new Set(gains.map((gain) => gain.base))];
  const codecs = [...new Set(gains.map(codecOf))].sort((a, b) => CODECS.indexOf(a) - CODECS.indexOf(b));
  const rows = bases.map((base) => {
    const own = gains.filter((gain) => gain.base === base);
    const best = Math.max(...own.map((gain) => gain.times_less_error));
    const cell = (gain) => gain === undefined ? "–" : html("div", { title: `nmse ${gain.nmse.toExponential(2)} against ${gain.base_nmse.toExponential(2)}` },
      html(gain.times_less_error === best ? "strong" : "span", {}, `${gain.times_less_error.toFixed(2)}×`),
      html("div", { class: "note" }, `${gain.codec}, ${gain.bits.toFixed(2)} bits`));
    return [html("div", {}, html("strong", {}, base), html("div", { class: "note" }, `${own[0].base_bits.toFixed(2)} bits`)),
      ...codecs.map((codec) => cell(own.find((gain) => codecOf(gain) === codec)))];
  });
  return html("div", {}, html("h3", {}, caption),
    html("p", { class: "note" }, "Of each codec its best rate that fits beside the baseline; below 1 it has more error, and fewer bits."), table(caption, [["baseline"], ...codecs.map((codec) => [codec, true])], rows));
}

let distributionShown = null;

function showBench(bench) {
  const names = bench.distributions.map((entry) => entry.distribution);
  if (!names.includes(distributionShown)) distributionShown = names[0];
  const shown = bench.distributions.find((entry) => entry.distribution === distributionShown);
  const choice = (name) => {
    const input = html("input", { type: "radio", name: "distribution-shown", value: name, checked: name === distributionShown });
    input.addEventListener("change", () => {
      distributionShown = name;
      showBench(bench);
      byId("kv-body").querySelector("input:checked").focus();
    });
    return html("label", {}, input, ` ${name}`);
  };
  const what = `${distributionShown}, ${whole(bench.vectors)} vectors of ${bench.dim}`;
  show("kv-body",
    names.length > 1 ? html("fieldset", { class: "choice" }, html("legend", {}, "Vectors"), names.map(choice)) : null,
    html("p", { class: "note" }, `${what} values, seed ${bench.seed}`),
    qualityPlots(shown.cells),
    gainTable(shown.iso_bit),
    details(`All ${shown.cells.length} figures, with speed on one core`, cellTable(`KV codecs on ${what}`, shown.cells)));
}

function showCompare(compared) {
  const what = `${whole(compared.vectors)} vectors of ${compared.dim}`;
  show("compare-body", html("p", { class: "note" }, `${compared.file}: ${what}`),
    cellTable(`Codecs on ${compared.file}`, compared.cells), qualityPlots(compared.cells), gainTable(compared.iso_bit));
}

const ACCESSES = {
  prefill: "a prompt of 512",
  prompt: "a prompt of 4096",
  decode: "one token",
  decode_batch: "64 sequences",
  scatter: "slices anywhere",
};
const WAYS = { mmap: ["mmap", 1], mmap_random: ["mmap, MADV_RANDOM", 4], flea: ["flea's row reader", 0] };

function showRows(rows) {
  const groups = [...new Set(rows.cases.map((one) => one.access))].map((access) => ({
    name: ACCESSES[access] || access,
    bars: rows.cases.filter((one) => one.access === access).map((one) => ({
      value: one.tokens_per_second,
      index: (WAYS[one.way] || [one.way, 7])[1],
      words: `${whole(one.tokens_per_second)}  ${(WAYS[one.way] || [one.way])[0]}`,
    })),
  }));
  const verdict = (name, text) => html("span", { class: `badge ${text === "FAIL" ? "infeasible" : text === "PASS" ? "resident" : "streamed"}` }, `${name}: ${text}`);
  const times = (access) => (isNumber(rows.times_mmap[access]) ? `${rows.times_mmap[access].toFixed(1)}×` : "–");
  const place = rows.tensor ? `${rows.tensor} of ${rows.path}` : rows.temporary_file ? `a temporary table in ${rows.path}` : rows.path;
  show("rows-body",
    html("p", { class: "note" }, `${place}: ${whole(rows.rows)} rows of ${whole(rows.row_bytes)} bytes on ${rows.filesystem}; ${rows.reader}, ${rows.direct_io}, ` +
      `${rows.depth} in flight, ${bytes(rows.budget_bytes)} for the row reader.`),
    tiles([
      ["Random decode, one token", times("decode"), "as many tokens/s as cold mmap"],
      ["Random decode, 64 sequences", times("decode_batch"), "as many tokens/s as cold mmap"],
      ["A prompt of any words", times("prompt"), "as many tokens/s as cold mmap"],
    ]),
    html("p", {}, verdict("speed", rows.speed_verdict), " ", verdict("memory", rows.memory_verdict)),
    logBars("Tokens per second from a table that is not in memory (logarithmic; longer is better)", "tokens/s", groups),
    rows.fallbacks.map((fallback) => message(fallback)),
    details(`All ${rows.cases.length} cases`, table("Cases of the row probe",
      [["access"], ["way"], ["tokens/s", true], ["MB/s", true], ["p50 µs", true], ["p99 µs", true], ["from drive", true], ["RSS peak", true], ["page cache", true]],
      rows.cases.map((one) => [one.access, one.way, whole(one.tokens_per_second), decimal(one.mb_per_second), whole(one.p50_ns / 1e3), whole(one.p99_ns / 1e3),
        bytes(one.drive_bytes), `+${bytes(one.resident_peak_bytes)}`, bytes(one.page_cache_bytes)]))));
}

const MEASURED = {
  "kv-bench": ["kv-from", "flea kv bench", showBench],
  "kv-compare": ["compare-from", "flea kv compare", showCompare],
  rows: ["rows-from", "flea probe rows", showRows],
};

function tellMissing(page) {
  for (const [what, [from, verb]] of Object.entries(MEASURED)) {
    if (embedded) {
      byId(from).textContent = `Not measured when this report was made. \`${verb} --json\` writes what \`flea dashboard --${what} FILE\` shows.`;
    } else if (what === "kv-compare" && !page.vectors) {
      byId(from).textContent = "No vectors were named. Begin with --vectors FILE --dim N, or show a result with --kv-compare FILE.";
    } else if (what === "rows") {
      byId(from).textContent = `Nothing is measured before you ask. It reads ${page.table} from the drive; in a directory, a temporary table.`;
    } else {
      byId(from).textContent = "Nothing is measured before you ask. One core computes meanwhile.";
    }
  }
}

// Revisions that are shown, by what was measured.
const shownRevisions = {};

async function showResults(results) {
  for (const [what, { from, revision }] of Object.entries(results)) {
    if (shownRevisions[what] === revision) continue;
    const [place, , draw] = MEASURED[what];
    const value = await ask(`api/${what}`);
    shownRevisions[what] = revision;
    byId(place).textContent = `${from[0].toUpperCase()}${from.slice(1)}.`;
    draw(value);
  }
}

// One after the other: an answer that began earlier never overtakes.
let followed = Promise.resolve();

function follow(state) {
  const { running, failed } = state;
  byId("progress").hidden = !running && !failed;
  byId("progress").classList.toggle("bad", Boolean(failed));
  byId("stop").textContent = running ? "Stop" : "Close";
  if (running) byId("progress-text").textContent = `${running.command}: ${running.doing}, ${span(running.seconds)}`;
  else if (failed) byId("progress-text").textContent = `${MEASURED[failed.what][1]}: ${failed.message}`;
  for (const button of document.querySelectorAll(".measure button")) button.disabled = Boolean(running);
  followed = followed.then(() => showResults(state.results));
  if (running) setTimeout(() => ask("api/measure").then(follow).catch(tellFailure), 500);
  return followed;
}

function tellFailure(refusal) {
  byId("progress").hidden = false;
  byId("progress").classList.add("bad");
  byId("stop").textContent = "Close";
  byId("progress-text").textContent = refusal.message;
  for (const button of document.querySelectorAll(".measure button")) button.disabled = false;
}

function prepareForms(page) {
  for (const form of document.querySelectorAll(".measure")) {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      ask(`api/measure/${form.dataset.what}`, new FormData(form), "POST").then(follow).catch(tellFailure);
    });
  }
  byId("compare-form").hidden = !page.vectors;
  byId("stop").addEventListener("click", () => {
    if (byId("stop").textContent === "Stop") ask("api/measure/stop", {}, "POST").catch(tellFailure);
    else byId("progress").hidden = true;
  });
}

function startMeasured(page) {
  tellMissing(page);
  if (!embedded) {
    prepareForms(page);
    return ask("api/measure").then(follow).catch(tellFailure);
  }
  for (const form of document.querySelectorAll(".measure")) form.remove();
  for (const [what, { from, value }] of Object.entries(embedded.measured)) {
    byId(MEASURED[what][0]).textContent = `${from[0].toUpperCase()}${from.slice(1)}.`;
    MEASURED[what][2](value);
  }
  return Promise.resolve();
}
