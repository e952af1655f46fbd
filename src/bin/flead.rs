//! `flead`: the daemon. Parse, serve, exit code; the work is in `flea::daemon`.

use std::process::ExitCode;

use clap::Parser;
use flea::cli::{self, flead};

/// Shares one pool of model weights and one drive among many programs
#[derive(Debug, Parser)]
#[command(name = "flead", version, after_help = flead::EXAMPLES)]
struct Flead {
    #[command(flatten)]
    args: flead::Args,

    /// Say more on stderr: -v what is done, -vv how, -vvv each step (FLEA_LOG sets the same per module)
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

fn main() -> ExitCode {
    let flead = match Flead::try_parse() {
        Ok(flead) => flead,
        Err(error) => return cli::usage(&error, false),
    };
    let result = flead::command(&flead.args, flead.verbose);
    cli::finish(result.map(|()| ExitCode::SUCCESS), false)
}
