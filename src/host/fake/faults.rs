//! What goes wrong on demand: calls that fail, writes that lose a race, messages that get lost, and what other VMs do
//! in the middle of an operation.

use std::collections::BTreeMap;

use super::FakeHost;
use crate::host::{HostError, Status};

#[derive(Default)]
pub(super) struct Faults {
    pub(super) conflicts: u32,
    pub(super) lost_messages: u32,
    failures: BTreeMap<&'static str, (u32, Status)>,
    /// Shared-data calls still to come before `failing` of them fail.
    sound: u32,
    failing: u32,
    /// What happens elsewhere before the shared-data call that comes after so many more.
    meanwhile: Option<(u32, Box<dyn FnOnce()>)>,
}

impl FakeHost {
    /// The next writes of shared data find that somebody else was faster.
    pub(crate) fn conflict_next(&self, writes: u32) {
        self.faults.borrow_mut().conflicts = writes;
    }

    /// The next messages that this VM sends are lost.
    pub(crate) fn lose_next(&self, messages: u32) {
        self.faults.borrow_mut().lost_messages = messages;
    }

    /// The next calls of that method fail.
    pub(crate) fn fail_next(&self, call: &'static str, times: u32, status: Status) {
        self.faults.borrow_mut().failures.insert(call, (times, status));
    }

    /// Of the shared-data calls, `sound` succeed, and then `failing` fail.
    pub(crate) fn fail_shared(&self, sound: u32, failing: u32) {
        let mut faults = self.faults.borrow_mut();
        (faults.sound, faults.failing) = (sound, failing);
    }

    /// Lets something happen in another VM before the shared-data call that comes after `calls` more.
    pub(crate) fn meanwhile(&self, calls: u32, act: impl FnOnce() + 'static) {
        self.faults.borrow_mut().meanwhile = Some((calls, Box::new(act)));
    }

    /// Whether what was to happen meanwhile is still to come; it does not any more.
    pub(crate) fn forget_meanwhile(&self) -> bool {
        self.faults.borrow_mut().meanwhile.take().is_some()
    }

    /// Before a shared-data call: what happens meanwhile, and whether the call fails.
    pub(super) fn shared_fault(&self, call: &'static str) -> Result<(), HostError> {
        let act = {
            let mut faults = self.faults.borrow_mut();
            match faults.meanwhile.take() {
                Some((0, act)) => Some(act),
                Some((calls, act)) => {
                    faults.meanwhile = Some((calls - 1, act));
                    None
                }
                None => None,
            }
        };
        if let Some(act) = act {
            act();
        }
        self.fault(call)?;
        let mut faults = self.faults.borrow_mut();
        if faults.sound > 0 {
            faults.sound -= 1;
            return Ok(());
        }
        if faults.failing > 0 {
            faults.failing -= 1;
            return Err(HostError { call, status: Status::InternalFailure });
        }
        Ok(())
    }

    pub(super) fn fault(&self, call: &'static str) -> Result<(), HostError> {
        match self.faults.borrow_mut().failures.get_mut(call) {
            Some((times, status)) if *times > 0 => {
                *times -= 1;
                Err(HostError { call, status: *status })
            }
            _ => Ok(()),
        }
    }
}
