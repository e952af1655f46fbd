//! What the programs share on the command line: one file per subcommand.

pub mod bench_raw;
