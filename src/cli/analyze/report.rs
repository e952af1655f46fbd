//! The answer of `flea analyze`: its fields are those of `--json`, its text is what a person reads.

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::{Value, json};

use super::super::inspect::printable;
use super::super::plan;
use super::super::table::{Align, Table};
use crate::model::arch::Geometry;
use crate::tools::analyze::dhurandhar::{self, Answer};
use crate::tools::analyze::{Breakdown, Device, Judgement, Question, Source, Verdict};
use crate::units::HumanBytes;

/// The whole answer.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct Report {
    model: String,
    name: String,
    family: String,
    origin: String,
    context_count: u64,
    context_max_count: Option<u64>,
    /// `null` where a file's own weights count.
    weight_bits: Option<f64>,
    kv_type: String,
    geometry: Value,
    components: Vec<Value>,
    total_bytes: u64,
    /// Keys and values on the drive, which a token reads with a full context, beside weights.
    kv_bytes_per_token: u64,
    devices: Vec<DeviceReport>,
    /// The worst of the devices'.
    verdict: &'static str,
    pub(super) exit_code: u8,
}

/// The answer for one device.
#[derive(Debug, Serialize)]
pub(super) struct DeviceReport {
    name: String,
    label: String,
    pub(super) memory_bytes: u64,
    drive_gb_per_second: Option<f64>,
    pub(super) verdict: &'static str,
    pub(super) exit_code: u8,
    /// What it holds; of what does not run, the least it would.
    need_bytes: u64,
    headroom_bytes: u64,
    missing_bytes: u64,
    smallest_bytes: u64,
    streamed_bytes_per_token: u64,
    /// `null` where no rate is known that would bound it.
    pub(super) tokens_per_second: Option<f64>,
    /// Where layers come with all their experts; `null` without experts, and for files, where `plan` tells.
    whole_layers_bytes_per_token: Option<u64>,
    whole_layers_tokens_per_second: Option<f64>,
    /// The largest context that it runs with.
    largest_context_count: Option<u64>,
    /// The largest context with which everything stays in memory.
    largest_resident_context_count: Option<u64>,
    /// Tables whose rows `flea run` would read are in memory with the rest.
    #[serde(skip)]
    pub(super) holds_tables: bool,
    /// What to type there; `null` where it does not run.
    pub(super) command: Option<String>,
    /// The plan of `flea plan`, where the model's files are there.
    plan: Option<plan::Report>,
}

impl DeviceReport {
    /// Of a model that is only described.
    pub(super) fn described(
        device: &Device,
        judgement: &Judgement,
        largest: Option<u64>,
        largest_resident: Option<u64>,
    ) -> Self {
        Self {
            name: device.name.clone(),
            label: device.label.clone(),
            memory_bytes: device.memory_bytes,
            drive_gb_per_second: device.drive_gb_per_second,
            verdict: judgement.verdict.name(),
            exit_code: judgement.verdict.exit_code(),
            need_bytes: judgement.need_bytes,
            headroom_bytes: judgement.headroom_bytes,
            missing_bytes: judgement.missing_bytes,
            smallest_bytes: judgement.smallest_bytes,
            streamed_bytes_per_token: judgement.streamed_bytes_per_token,
            tokens_per_second: judgement.tokens_per_second,
            whole_layers_bytes_per_token: judgement.whole_bytes_per_token,
            whole_layers_tokens_per_second: judgement.whole_tokens_per_second,
            largest_context_count: largest,
            largest_resident_context_count: largest_resident,
            holds_tables: false,
            command: None,
            plan: None,
        }
    }

    /// Of a model whose files are there; `report` is `None` where no plan fits.
    pub(super) fn planned(
        device: &Device,
        verdict: Verdict,
        report: Option<plan::Report>,
        smallest_bytes: u64,
        largest: Option<u64>,
        largest_resident: Option<u64>,
    ) -> Self {
        let need_bytes = report
            .as_ref()
            .map_or(smallest_bytes, |report| report.peak_memory_bytes);
        let prediction = report.as_ref().and_then(|report| report.prediction);
        Self {
            name: device.name.clone(),
            label: device.label.clone(),
            memory_bytes: device.memory_bytes,
            drive_gb_per_second: device.drive_gb_per_second,
            verdict: verdict.name(),
            exit_code: verdict.exit_code(),
            need_bytes,
            headroom_bytes: device.memory_bytes.saturating_sub(need_bytes),
            missing_bytes: need_bytes.saturating_sub(device.memory_bytes),
            smallest_bytes,
            streamed_bytes_per_token: report
                .as_ref()
                .map_or(0, |report| report.streamed_bytes_per_pass),
            tokens_per_second: prediction.and_then(|prediction| prediction.tokens_per_second),
            whole_layers_bytes_per_token: None,
            whole_layers_tokens_per_second: None,
            largest_context_count: largest,
            largest_resident_context_count: largest_resident,
            holds_tables: false,
            command: None,
            plan: report,
        }
    }

    /// The same of a model with tables whose rows `flea run` would read: in memory with the rest where all is.
    pub(super) fn with_tables(self, has_tables: bool) -> Self {
        let holds_tables = has_tables && self.exit_code == Verdict::Resident.exit_code();
        Self {
            holds_tables,
            ..self
        }
    }

    /// The same where a token of a full context reads so many bytes of keys and values besides: no faster than the drive.
    pub(super) fn with_kv_read(mut self, kv_bytes: u64) -> Self {
        if kv_bytes > 0
            && let (Some(tokens), Some(drive)) = (self.tokens_per_second, self.drive_gb_per_second)
        {
            let read_bytes = self.streamed_bytes_per_token.saturating_add(kv_bytes);
            self.tokens_per_second = Some(tokens.min(drive * 1e9 / read_bytes as f64));
        }
        self
    }

    /// Whether its speed is only a bound of what is read.
    fn leaves_compute_out(&self) -> bool {
        let plan = self.plan.as_ref();
        let predicted = plan.and_then(|plan| plan.prediction);
        self.tokens_per_second.is_some() && predicted.is_none_or(|p| p.compute_seconds == 0.0)
    }

    /// Whether the plan calls its prediction one.
    fn is_upper_bound(&self) -> bool {
        let predicted = self.plan.as_ref().and_then(|plan| plan.prediction);
        predicted.is_some_and(|prediction| prediction.is_upper_bound)
    }

    /// Whether it runs at all.
    pub(super) const fn runs(&self) -> bool {
        self.exit_code != Verdict::Infeasible.exit_code()
    }
}

impl Report {
    pub(super) fn new(
        model: &str,
        source: &Source,
        question: &Question,
        breakdown: &Breakdown,
        is_filed: bool,
        devices: Vec<DeviceReport>,
    ) -> Self {
        let geometry = &source.geometry;
        let components = breakdown.components();
        let worst = devices.iter().max_by_key(|device| device.exit_code);
        Self {
            model: model.to_owned(),
            name: geometry.name.clone(),
            family: geometry.family.clone(),
            origin: source.origin.clone(),
            context_count: question.context_count,
            context_max_count: geometry.context_max_count,
            weight_bits: (!is_filed).then_some(question.weight_bits),
            kv_type: question.kv.to_string(),
            geometry: describe(geometry),
            components: components
                .iter()
                .map(|part| json!({"name": part.name, "what": part.what, "bytes": part.bytes}))
                .collect(),
            total_bytes: breakdown.total_bytes(),
            kv_bytes_per_token: breakdown.kv_drive_bytes,
            verdict: worst.map_or(Verdict::Resident.name(), |device| device.verdict),
            exit_code: worst.map_or(0, |device| device.exit_code),
            devices,
        }
    }

    pub(super) fn text(&self) -> String {
        let mut text = self.head().to_string();
        let _ = write!(
            text,
            "\n{}\n{}",
            self.component_table(),
            self.device_table()
        );
        let notes = self.notes();
        if !notes.is_empty() {
            let _ = write!(text, "\n{}\n", notes.join("\n"));
        }
        let mut runs = Table::fields();
        for device in &self.devices {
            if let Some(command) = &device.command {
                runs.field(&device.name, command);
            }
        }
        let runs = runs.to_string();
        if !runs.is_empty() {
            let _ = write!(text, "\n{runs}");
        }
        text
    }

    /// What the tables do not say.
    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.devices.iter().any(DeviceReport::leaves_compute_out) {
            notes.push(
                "tokens/s are what the drive, or the memory, allows; computing is left out"
                    .to_owned(),
            );
        }
        for device in &self.devices {
            let name = &device.name;
            if let Some(why) = device.plan.as_ref().and_then(plan::Report::why_compressed) {
                notes.push(format!("{name}: no tokens/s: {why}"));
            }
            if device.is_upper_bound() {
                notes.push(format!(
                    "{name}: an upper bound: what a host loses around the reads of each layer's experts is not known"
                ));
            }
            if let Some(rate) = device.whole_layers_tokens_per_second {
                let bytes = HumanBytes(device.whole_layers_bytes_per_token.unwrap_or(0));
                let rate = rate_text(Some(rate));
                notes.push(format!(
                    "{name}: only chosen experts are read; through the daemon whole layers are, {bytes} per token, {rate} tokens/s"
                ));
            }
        }
        if self.kv_bytes_per_token > 0 {
            notes.push(format!(
                "with a full context a token also reads {} of keys and values",
                HumanBytes(self.kv_bytes_per_token)
            ));
        }
        notes
    }

    fn head(&self) -> Table {
        let mut table = Table::fields();
        let number = |key: &str| self.geometry[key].as_u64().unwrap_or(0);
        let parameters =
            |key: &str| self.geometry["parameters"][key].as_f64().unwrap_or(0.0) as u128;
        let family = if self.family.is_empty() {
            String::new()
        } else {
            format!("{}, ", printable(&self.family))
        };
        table.field(
            "model",
            format_args!(
                "{} ({family}{} layers of width {})",
                printable(&self.name),
                number("layers"),
                number("hidden")
            ),
        );
        let active = match number("experts") {
            0 => String::new(),
            experts => format!(
                ", of which a token uses {} of the layers ({} of {experts} experts)",
                billions(parameters("active")),
                number("experts_used")
            ),
        };
        table.field(
            "parameters",
            format_args!("{}{active}", billions(parameters("text"))),
        );
        table.field("from", printable(&self.origin));
        let most = self
            .context_max_count
            .map_or(String::new(), |most| format!(" of at most {most}"));
        table.field(
            "context",
            format_args!("{}{most} tokens", self.context_count),
        );
        let weights = self
            .weight_bits
            .map_or("as in the file".to_owned(), |bits| format!("{bits} bits"));
        table.field(
            "stored",
            format_args!("weights {weights}, keys and values {}", self.kv_type),
        );
        table
    }

    fn component_table(&self) -> Table {
        let mut table = Table::new(&[
            ("component", Align::Left),
            ("size", Align::Right),
            ("what", Align::Left),
        ]);
        for part in &self.components {
            table.row([
                part["name"].as_str().unwrap_or_default().to_owned(),
                HumanBytes(part["bytes"].as_u64().unwrap_or(0)).to_string(),
                part["what"].as_str().unwrap_or_default().to_owned(),
            ]);
        }
        table.row([
            "total".to_owned(),
            HumanBytes(self.total_bytes).to_string(),
            String::new(),
        ]);
        table
    }

    fn device_table(&self) -> Table {
        let mut table = Table::new(&[
            ("device", Align::Left),
            ("memory", Align::Right),
            ("verdict", Align::Left),
            ("holds", Align::Right),
            ("left", Align::Right),
            ("read per token", Align::Right),
            ("tokens/s", Align::Right),
            ("largest context", Align::Right),
        ]);
        for device in &self.devices {
            let left = if device.missing_bytes > 0 {
                format!("{} missing", HumanBytes(device.missing_bytes))
            } else {
                HumanBytes(device.headroom_bytes).to_string()
            };
            let streamed = match device.streamed_bytes_per_token {
                0 => "-".to_owned(),
                bytes => HumanBytes(bytes).to_string(),
            };
            table.row([
                device.name.clone(),
                HumanBytes(device.memory_bytes).to_string(),
                device.verdict.to_owned(),
                HumanBytes(device.need_bytes).to_string(),
                left,
                streamed,
                rate_text(device.tokens_per_second),
                device
                    .largest_context_count
                    .map_or("none".to_owned(), |count| count.to_string()),
            ]);
        }
        table
    }
}

fn rate_text(rate: Option<f64>) -> String {
    match rate {
        None => "-".to_owned(),
        Some(rate) if rate < 0.095 => format!("{rate:.3}"),
        Some(rate) if rate < 100.0 => format!("{rate:.1}"),
        Some(rate) => format!("{rate:.0}"),
    }
}

/// `1.24 B`, `494 M`.
pub(super) fn billions(count: u128) -> String {
    match count as f64 {
        count if count >= 1e12 => format!("{:.2} T", count / 1e12),
        count if count >= 1e9 => format!("{:.2} B", count / 1e9),
        count if count >= 1e6 => format!("{:.0} M", count / 1e6),
        count => format!("{count}"),
    }
}

/// The geometry as JSON: the numbers of a model, without one entry for each layer.
fn describe(geometry: &Geometry) -> Value {
    let (full, windowed) = geometry.kv_layer_counts();
    let attention = geometry.blocks.iter().find_map(|block| block.attention);
    let window = geometry
        .blocks
        .iter()
        .find_map(|block| block.attention?.window_count);
    let sharing = geometry
        .blocks
        .iter()
        .filter(|block| block.attention.is_some_and(|a| a.shares_kv))
        .count();
    let with_state = geometry
        .blocks
        .iter()
        .filter(|block| block.state_element_count > 0)
        .count();
    let experts = geometry.experts();
    let count = |count: u128| u64::try_from(count).unwrap_or(u64::MAX);
    json!({
        "layers": geometry.blocks.len(),
        "hidden": geometry.hidden_count,
        "vocabulary": geometry.vocabulary_count,
        "heads": attention.map(|a| a.head_count),
        "kv_heads": attention.map(|a| a.kv_head_count),
        "kv_vectors": geometry.kv_vector_counts(),
        "window": window,
        "layers_full": full,
        "layers_windowed": windowed,
        "layers_sharing_kv": sharing,
        "layers_with_state": with_state,
        "experts": experts.map(|experts| experts.count),
        "experts_used": experts.map(|experts| experts.used_count),
        "tied_embeddings": geometry.tied_embeddings,
        "encoders": geometry.encoders.iter().map(|e| json!({"name": e.name, "parameters": e.parameter_count})).collect::<Vec<_>>(),
        "parameters": {
            "decoder": count(geometry.decoder_parameter_count()),
            "embedding": count(geometry.embedding_parameter_count()),
            "head": count(geometry.head_parameter_count()),
            "per_layer_tables": count(geometry.row_table_parameter_count()),
            "text": count(geometry.text_parameter_count()),
            "active": count(geometry.active_parameter_count()),
            "largest_layer": count(geometry.largest_layer_parameter_count()),
        },
    })
}

/// The answer of dhurandhar 0.1.3 for people.
pub(super) fn compat_text(model: &str, answer: &Answer) -> String {
    let mut parts = Table::new(&[("component", Align::Left), ("MB", Align::Right)]);
    for (name, value) in [
        ("decoder", answer.decoder_mb),
        ("embedding", answer.embedding_mb),
        ("KV cache", answer.kv_cache_mb),
        ("Mamba state", answer.mamba_state_mb),
        ("vision encoder", answer.vision_encoder_mb),
        ("audio encoder", answer.audio_encoder_mb),
        ("activations", answer.activations_overhead_mb),
        ("runtime", answer.runtime_overhead_mb),
        ("total, resident", answer.resident_total_mb),
        ("total, PLE mapped", answer.mmap_total_mb),
    ] {
        parts.row([name.to_owned(), format!("{value:.2}")]);
    }
    let mut devices = Table::new(&[
        ("device", Align::Left),
        ("mode", Align::Left),
        ("notes", Align::Left),
    ]);
    for device in &answer.devices {
        devices.row([device.device.as_str(), device.mode, &device.notes]);
    }
    format!(
        "{model} as {} has it (known to be wrong; without --compat flea says what is right)\n\n{parts}\n{devices}",
        dhurandhar::NAME
    )
}
