//! `flea`: runs models that do not fit, and the tools around that. Parse, dispatch, exit code; the work is in `flea::cli`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use flea::cli;

/// Runs models that do not fit: streams LLM weights from NVMe into a hard memory budget just before they are used
#[derive(Debug, Parser)]
#[command(name = "flea", version, after_help = cli::EXAMPLES, arg_required_else_help = true)]
struct Flea {
    #[command(subcommand)]
    command: Command,

    /// Say more on stderr: -v what is done, -vv how, -vvv each step (FLEA_LOG sets the same per module)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Generate text, reading weights from the drive as they are needed
    #[cfg(feature = "run")]
    Run(cli::run::Args),
    /// Show what is in a model: layers, tensors, extents
    Inspect(cli::inspect::Args),
    /// Show what would be resident and what streamed, for a memory budget
    Plan(cli::plan::Args),
    /// Say what a model needs and where it runs, before it is fetched or hardware bought
    Analyze(cli::analyze::Args),
    /// Say what a million tokens cost
    Cost(cli::cost::Args),
    /// Measure the drive and the streaming of a model
    Bench(cli::bench::Args),
    /// Measure a drive and this machine's memory, and keep the result for the others
    Probe(cli::probe::Args),
    /// Look at everything flea needs of this machine, and say what would mend it
    Doctor(cli::doctor::Args),
    /// Measure the codecs for keys and values: quality, bits, speed
    Kv(cli::kv::Args),
    /// Show what analyze, kv, probe rows and a running flead say on a page in the browser
    Dashboard(cli::dashboard::Args),
    /// Rewrite a model in the order in which its weights are used
    Pack(cli::pack::Args),
    /// Write a synthetic model of any size that llama.cpp loads
    Synth(cli::synth::Args),
}

fn main() -> ExitCode {
    let json = cli::wants_json(std::env::args_os());
    let flea = match Flea::try_parse() {
        Ok(flea) => flea,
        Err(error) => return cli::usage(&error, json),
    };
    cli::start_logging(flea.verbose);
    cli::warn_about_environment();
    let result = match &flea.command {
        #[cfg(feature = "run")]
        Command::Run(args) => cli::run::command(args),
        Command::Inspect(args) => cli::inspect::command(args).map(|()| ExitCode::SUCCESS),
        Command::Plan(args) => cli::plan::command(args).map(|()| ExitCode::SUCCESS),
        Command::Analyze(args) => cli::analyze::command(args),
        Command::Cost(args) => cli::cost::command(args),
        Command::Bench(args) => cli::bench::command(args),
        Command::Probe(args) => cli::probe::command(args),
        Command::Doctor(args) => cli::doctor::command(args),
        Command::Kv(args) => cli::kv::command(args).map(|()| ExitCode::SUCCESS),
        Command::Dashboard(args) => cli::dashboard::command(args).map(|()| ExitCode::SUCCESS),
        Command::Pack(args) => cli::pack::command(args).map(|()| ExitCode::SUCCESS),
        Command::Synth(args) => cli::synth::command(args).map(|()| ExitCode::SUCCESS),
    };
    cli::finish(result, json)
}
