//! How a request asks for its locks: the one place of the filter that tells backends apart.

use std::rc::Rc;
use std::sync::Arc;

use interlock_core::{Cause, OwnerId, Refusal, Request, StoreError, Want};

use super::stream::Case;
use super::{Runtime, fences};
use crate::answer::Reject;
use crate::backend::Outcome;
use crate::backend::authority::Wish;
use crate::backend::etcd;
use crate::host::{ContextId, Host};
use crate::policy::{self, Backend, Reentrancy};

impl Runtime {
    /// Asks for the locks of a stream, from its own callback.
    pub(super) fn ask(
        &mut self,
        host: &dyn Host,
        id: ContextId,
        case: &Case,
        owner: OwnerId,
        wants: Vec<Want>,
    ) -> Outcome {
        let first = wants.first().map(|want| (want.name.clone(), want.mode));
        let asked = match &case.active.policy.backend {
            Backend::Local => self.ask_local(host, case, owner.clone(), wants),
            Backend::Authority(at) => self.ask_authority(host, id, case, at, owner.clone(), wants),
            Backend::Etcd(at) => self.ask_etcd(host, id, case, at, owner.clone(), wants),
        };
        asked.unwrap_or_else(|detail| {
            Outcome::Refused(Box::new(match first {
                Some((lock, mode)) => Reject::Core(Refusal { lock, mode, owner, cause: Cause::Backend { detail } }),
                None => Reject::Malformed { detail: String::from("it names no lock") },
            }))
        })
    }

    fn ask_local(&mut self, host: &dyn Host, case: &Case, owner: OwnerId, wants: Vec<Want>) -> Result<Outcome, String> {
        let (purpose, rules) = (case.purpose(), &case.active.rules);
        let reentrancy = case.active.policy.reentrancy;
        self.beat(host, purpose);
        let asked = host.now();
        let outcome = match self.backends.local(purpose) {
            Some(local) => local.new_lease().and_then(|lease| {
                let owner = match reentrancy {
                    Reentrancy::Lease => fences::branch(host, local, rules, &owner, lease, &case.carried)?,
                    Reentrancy::Owner | Reentrancy::None => owner,
                };
                let request = Request::new(lease, owner, case.arrived, wants, &rules.classes)
                    .reentrant(reentrancy != Reentrancy::None)
                    .asked_by(case.terms.asked_by.clone());
                Ok(local.acquire(host, rules, request).into())
            }),
            None => Err(StoreError::Failed(String::from("the table is not open"))),
        };
        case.active.telemetry.backend(host, host.now().since(asked));
        self.deliver(host, purpose);
        outcome.map_err(|error| error.to_string())
    }

    fn ask_authority(
        &mut self,
        host: &dyn Host,
        id: ContextId,
        case: &Case,
        at: &Arc<policy::Authority>,
        owner: OwnerId,
        wants: Vec<Want>,
    ) -> Result<Outcome, String> {
        let instance = &case.active.policy.instance;
        let authority =
            self.backends.authority(host, instance, at, case.purpose()).map_err(|error| error.to_string())?;
        let wish = Wish { owner, wants, asked_by: case.terms.asked_by.clone(), arrived: case.arrived };
        let waiting = authority.ask(host, id, wish).map_err(|error| error.to_string())?;
        // It may be refused already, where the host cannot call.
        Ok(authority.poll(host, waiting))
    }

    fn ask_etcd(
        &mut self,
        host: &dyn Host,
        id: ContextId,
        case: &Case,
        at: &Arc<policy::Etcd>,
        owner: OwnerId,
        wants: Vec<Want>,
    ) -> Result<Outcome, String> {
        let policy = &case.active.policy;
        let etcd = self.backends.etcd(host, &policy.instance, at, case.purpose()).map_err(|error| error.to_string())?;
        let wish = etcd::Wish {
            owner,
            reentrant: policy.reentrancy != Reentrancy::None,
            wants,
            asked_by: case.terms.asked_by.clone(),
            arrived: case.arrived,
            rules: Rc::clone(&case.active.rules),
        };
        let waiting = etcd.ask(host, id, wish).map_err(|error| error.to_string())?;
        // As above.
        Ok(etcd.poll(waiting))
    }
}
