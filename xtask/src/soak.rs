//! `cargo xtask soak`.

use anyhow::{Result, bail};
use clap::Args;

#[derive(Debug, Args)]
pub struct SoakArgs {
    /// How long, in minutes
    #[arg(long, conflicts_with = "seconds")]
    minutes: Option<u32>,
    /// How long, in seconds
    #[arg(long)]
    seconds: Option<u32>,
}

pub fn run(args: SoakArgs) -> Result<()> {
    let length = args.seconds.or(args.minutes.map(|minutes| minutes * 60));
    bail!("the soak is not there yet (asked for {length:?} s)")
}
