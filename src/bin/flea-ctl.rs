//! `flea-ctl`: looks after a running flead. Parse, dispatch, exit code; the work is in `flea::cli::ctl`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use flea::cli;
use flea::cli::ctl;

/// Looks after flead, the daemon that shares one pool of model weights and one drive among many programs
#[derive(Debug, Parser)]
#[command(name = "flea-ctl", version, after_help = ctl::EXAMPLES, arg_required_else_help = true)]
struct FleaCtl {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    options: ctl::Options,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the daemon: budget, pools, memory pressure, models, clients
    Status,
    /// List the models it holds
    Models,
    /// Open a model before anybody asks for it
    Load(ctl::LoadArgs),
    /// Close a model that nobody is attached to
    Unload(ctl::ModelArgs),
    /// Keep a model loaded when memory is wanted for another
    Pin(ctl::ModelArgs),
    /// Take that back
    Unpin(ctl::ModelArgs),
    /// Show who holds which layer
    Leases,
    /// Show the size of the pools, or change it while clients run
    Budget(ctl::BudgetArgs),
    /// Show the counters of models and clients
    Stats,
    /// Print metrics as Prometheus text
    Metrics(ctl::MetricsArgs),
    /// Watch it live: GB/s, stalls, residency per model, clients
    Top(ctl::top::Args),
    /// Check a flead.toml, or show every value and where it comes from
    #[command(subcommand)]
    Config(ctl::config::Command),
    /// Show the version of this program and of the daemon
    Version,
}

fn main() -> ExitCode {
    let json = cli::wants_json(std::env::args_os());
    let parsed = match FleaCtl::try_parse() {
        Ok(parsed) => parsed,
        Err(error) => return cli::usage(&error, json),
    };
    cli::start_logging(parsed.options.verbose);
    cli::warn_about_environment();
    let options = &parsed.options;
    let result = match &parsed.command {
        Command::Status => ctl::status(options),
        Command::Models => ctl::models(options),
        Command::Load(args) => ctl::load(options, args),
        Command::Unload(args) => ctl::unload(options, args),
        Command::Pin(args) => ctl::pin(options, args),
        Command::Unpin(args) => ctl::unpin(options, args),
        Command::Leases => ctl::leases(options),
        Command::Budget(args) => ctl::budget(options, args),
        Command::Stats => ctl::stats(options),
        Command::Metrics(args) => ctl::metrics(options, args),
        Command::Top(args) => ctl::top::command(options, args),
        Command::Config(command) => ctl::config::command(options, command),
        Command::Version => ctl::version(options),
    };
    cli::finish(result.map(|()| ExitCode::SUCCESS), json)
}
