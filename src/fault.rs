//! Faults on demand, so that tests can kill a VM or step its wall clock. Compiled only with the feature `fault-injection`,
//! which ships nowhere.

use std::cell::Cell;

use crate::host::{Headers, Host};

thread_local! {
    /// By how many microseconds this VM's wall clock is off.
    static STEP: Cell<i64> = const { Cell::new(0) };
}

/// Does what the request asks for: `panic` traps, `clock=N` sets the wall clock of this VM N microseconds off.
pub fn inject(host: &dyn Host) {
    let fault = host.header(Headers::Request, "x-interlock-fault").ok().flatten();
    match fault.as_deref() {
        Some(b"panic") => {
            #[cfg(target_arch = "wasm32")]
            core::arch::wasm32::unreachable();
        }
        Some(other) => {
            let step = other.strip_prefix(b"clock=").and_then(|step| core::str::from_utf8(step).ok());
            if let Some(step) = step.and_then(|step| step.parse().ok()) {
                STEP.set(step);
            }
        }
        None => {}
    }
}

/// The wall clock as this VM is to read it.
#[cfg(target_arch = "wasm32")]
pub fn clock(unix_micros: u64) -> u64 {
    unix_micros.saturating_add_signed(STEP.get())
}
