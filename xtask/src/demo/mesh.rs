//! `cargo xtask demo mesh`: four services with a sidecar each and an authority, from the bootstraps in envoy/mesh, in three acts
//! with checks of their own. What is shown is what happened: nothing here knows how an act will end.
//!
//! [`stage`] is what runs, [`acts`] who asks the services behind the sidecars for what.

mod acts;
mod stage;

use anyhow::{Context, Result, bail};

use super::screen::Screen;
use crate::run;
use stage::Stage;

/// Plays the three acts.
///
/// # Errors
/// When something could not be started, or an act did not go as it must.
pub fn play() -> Result<()> {
    run::block_on(async {
        let screen = Screen::new();
        let mut stage = Stage::set().await.context("the mesh could not be started")?;
        let mut failed = 0;
        for act in 1..=3 {
            let failures = match act {
                1 => acts::cycle(&screen, &mut stage).await,
                2 => acts::restart(&screen, &mut stage).await,
                _ => acts::stale(&screen, &mut stage).await,
            };
            let failures = failures.with_context(|| format!("act {act} could not be played"))?;
            screen.verdict(&failures);
            failed += usize::from(!failures.is_empty());
        }
        if failed > 0 {
            bail!("{failed} of 3 acts did not go as they must");
        }
        Ok(())
    })
}
