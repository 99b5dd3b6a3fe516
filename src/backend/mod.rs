//! Where locks are kept. One module a backend; the rules about locks are the core's.
//!
//! A request is asked for in the way of its backend: `local` decides at once, `authority` and `etcd` when an answer comes. From then on
//! the filter treats all alike, by what is here: a request [`Waiting`] is polled, whenever its backend says that something was
//! decided, or cancelled; a [`Lease`] is looked after and released. Each carries what its own backend needs, so that a request
//! goes on where it began, whatever is configured meanwhile.

pub mod authority;
pub mod etcd;
pub mod local;
pub mod remote;
pub mod seen;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use interlock_core::{Duration, Grant, LockName, Loss, Mode, OwnerId, Rules, Time};

use crate::answer::Reject;
use crate::host::{Host, HostError, Status};
use crate::policy;
use authority::Authority;
use etcd::Etcd;
use local::Local;
use remote::Remote;

/// Which of an instance's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// The one whose decisions count.
    Enforce,
    /// The shadow of it: what would be decided if requests under audit were enforced.
    Audit,
}

impl Purpose {
    /// Both.
    pub const ALL: [Purpose; 2] = [Purpose::Enforce, Purpose::Audit];
}

/// What has become of a request.
#[derive(Debug)]
pub enum Outcome {
    /// It holds all its locks.
    Granted(Lease),
    /// Nothing yet.
    Waiting(Waiting),
    /// It does not get them, and holds nothing.
    Refused(Box<Reject>),
}

impl From<interlock_core::Outcome> for Outcome {
    fn from(outcome: interlock_core::Outcome) -> Self {
        match outcome {
            interlock_core::Outcome::Granted(lease) => Outcome::Granted(Lease::Local(lease)),
            interlock_core::Outcome::Waiting(pending) => Outcome::Waiting(Waiting::Local(Box::new(pending))),
            interlock_core::Outcome::Refused(refusal) => Outcome::Refused(Box::new(Reject::Core(refusal))),
        }
    }
}

/// A request that waits.
#[derive(Debug)]
#[must_use = "a request that waits must be polled or cancelled"]
pub enum Waiting {
    /// In the queue of a lock.
    Local(Box<interlock_core::Pending>),
    /// For an answer.
    Authority(remote::Waiting),
    /// For its turn in etcd.
    Etcd(remote::Waiting),
}

impl Waiting {
    /// Who waits.
    pub fn owner(&self) -> &OwnerId {
        match self {
            Waiting::Local(pending) => pending.owner(),
            Waiting::Authority(waiting) | Waiting::Etcd(waiting) => waiting.owner(),
        }
    }

    /// The lock that it waits for, as far as that is known, and the mode.
    pub fn waits_for(&self) -> Option<(&LockName, Mode)> {
        match self {
            Waiting::Local(pending) => pending.waits_for(),
            Waiting::Authority(waiting) | Waiting::Etcd(waiting) => waiting.waits_for(),
        }
    }

    /// When to poll it even if nothing says so.
    pub fn poll_at(&self) -> Time {
        match self {
            Waiting::Local(pending) => pending.poll_at(),
            Waiting::Authority(_) | Waiting::Etcd(_) => Time::NEVER,
        }
    }
}

/// Locks that a request holds.
#[derive(Debug)]
#[must_use = "a lease must be released"]
pub enum Lease {
    /// In this Envoy's table.
    Local(interlock_core::Lease),
    /// At an authority.
    Authority(remote::Lease),
    /// In etcd.
    Etcd(remote::Lease),
}

impl Lease {
    /// Who holds.
    pub fn owner(&self) -> &OwnerId {
        match self {
            Lease::Local(lease) => lease.owner(),
            Lease::Authority(lease) | Lease::Etcd(lease) => lease.owner(),
        }
    }

    /// What it holds.
    pub fn grants(&self) -> &[Grant] {
        match self {
            Lease::Local(lease) => lease.grants(),
            Lease::Authority(lease) | Lease::Etcd(lease) => lease.grants(),
        }
    }

    /// When the first of its locks ends, renewed or not.
    pub fn until(&self) -> Time {
        self.grants().iter().map(|grant| grant.until).min().unwrap_or(Time::NEVER)
    }

    /// The shortest TTL among its locks.
    pub fn ttl(&self) -> Duration {
        self.grants().iter().map(|grant| grant.ttl).min().unwrap_or(Duration::MAX)
    }
}

/// The backends of an instance in one VM: those that its configurations named, as long as anything hangs on them.
#[derive(Default)]
pub struct Backends {
    enforce: Option<Local>,
    audit: Option<Local>,
    authorities: Vec<Authority>,
    etcds: Vec<Etcd>,
    /// How many clients there were.
    numbered: u32,
}

impl Backends {
    /// The table in this Envoy, if it is open.
    pub fn local(&mut self, purpose: Purpose) -> Option<&mut Local> {
        match purpose {
            Purpose::Enforce => self.enforce.as_mut(),
            Purpose::Audit => self.audit.as_mut(),
        }
    }

    /// The table in this Envoy; opens it if it is not. See [`Local::open`].
    ///
    /// # Errors
    /// Those of the host.
    pub fn open_local(&mut self, host: &dyn Host, instance: &str, purpose: Purpose) -> Result<&mut Local, HostError> {
        let place = match purpose {
            Purpose::Enforce => &mut self.enforce,
            Purpose::Audit => &mut self.audit,
        };
        match place {
            Some(local) => Ok(local),
            None => Ok(place.insert(Local::open(host, instance, purpose)?)),
        }
    }

    /// The client of an authority; makes one if there is none.
    ///
    /// # Errors
    /// Those of the host.
    pub fn authority(
        &mut self,
        host: &dyn Host,
        instance: &str,
        at: &Arc<policy::Authority>,
        purpose: Purpose,
    ) -> Result<&mut Authority, HostError> {
        let index = match self.authorities.iter().position(|authority| authority.is(at, purpose)) {
            Some(index) => index,
            None => {
                self.numbered += 1;
                self.authorities.push(Authority::open(host, instance, self.numbered, Arc::clone(at), purpose)?);
                self.authorities.len() - 1
            }
        };
        // It is there: it was found or made just now.
        self.authorities.get_mut(index).ok_or(HostError { call: "authority", status: Status::NotFound })
    }

    /// The client of etcd; makes one if there is none.
    ///
    /// # Errors
    /// Those of the host.
    pub fn etcd(
        &mut self,
        host: &dyn Host,
        instance: &str,
        at: &Arc<policy::Etcd>,
        purpose: Purpose,
    ) -> Result<&mut Etcd, HostError> {
        let index = match self.etcds.iter().position(|etcd| etcd.is(at, purpose)) {
            Some(index) => index,
            None => {
                self.numbered += 1;
                self.etcds.push(Etcd::open(host, instance, self.numbered, Arc::clone(at), purpose)?);
                self.etcds.len() - 1
            }
        };
        // As above.
        self.etcds.get_mut(index).ok_or(HostError { call: "etcd", status: Status::NotFound })
    }

    /// Leaves the tables in this Envoy.
    pub fn close_locals(&mut self) {
        (self.enforce, self.audit) = (None, None);
    }

    /// When something is due: a heartbeat, or something that has to do with an authority.
    pub fn next_due(&self) -> Time {
        let beats = self.enforce.iter().chain(&self.audit).map(Local::next_beat);
        let far = self.authorities.iter().map(Authority::next_due).chain(self.etcds.iter().map(Etcd::next_due));
        beats.chain(far).min().unwrap_or(Time::NEVER)
    }

    /// The clients of etcd.
    pub fn etcds(&mut self) -> &mut [Etcd] {
        &mut self.etcds
    }

    /// The clients of all authorities.
    pub fn authorities(&mut self) -> &mut [Authority] {
        &mut self.authorities
    }

    /// The clients of all who are asked.
    pub fn remotes(&mut self) -> impl Iterator<Item = &mut dyn Remote> {
        let authorities = self.authorities.iter_mut().map(|authority| authority as &mut dyn Remote);
        authorities.chain(self.etcds.iter_mut().map(|etcd| etcd as &mut dyn Remote))
    }

    /// Forgets the clients that nothing hangs on and that are not of this backend.
    pub fn retire(&mut self, current: &policy::Backend) {
        self.authorities.retain(|authority| {
            let named = |purpose| match current {
                policy::Backend::Local | policy::Backend::Etcd(_) => false,
                policy::Backend::Authority(at) => authority.is(at, purpose),
            };
            !authority.is_idle() || Purpose::ALL.into_iter().any(named)
        });
        self.etcds.retain(|etcd| {
            let named = |purpose| match current {
                policy::Backend::Local | policy::Backend::Authority(_) => false,
                policy::Backend::Etcd(at) => etcd.is(at, purpose),
            };
            !etcd.is_closed() || Purpose::ALL.into_iter().any(named)
        });
    }

    /// Whether no lease is asked for, held or to be given back by message.
    pub fn is_idle(&self) -> bool {
        self.authorities.iter().all(Authority::is_idle) && self.etcds.iter().all(Etcd::is_idle)
    }

    fn etcd_of(&mut self, client: u32) -> Option<&mut Etcd> {
        self.etcds.iter_mut().find(|other| other.number() == client)
    }

    fn authority_of(&mut self, client: u32) -> Option<&mut Authority> {
        self.authorities.iter_mut().find(|other| other.number() == client)
    }

    /// What has become of a request that waits.
    pub fn poll(&mut self, host: &dyn Host, purpose: Purpose, rules: &Rules, waiting: Waiting) -> Outcome {
        match waiting {
            Waiting::Local(pending) => match self.local(purpose) {
                Some(local) => local.poll(host, rules, *pending).into(),
                None => Outcome::Waiting(Waiting::Local(pending)),
            },
            Waiting::Authority(waiting) => match self.authority_of(waiting.client()) {
                Some(authority) => authority.poll(host, waiting),
                None => Outcome::Waiting(Waiting::Authority(waiting)),
            },
            Waiting::Etcd(waiting) => match self.etcd_of(waiting.client()) {
                Some(etcd) => etcd.poll(waiting),
                None => Outcome::Waiting(Waiting::Etcd(waiting)),
            },
        }
    }

    /// Gives a request up that waits.
    pub fn cancel(&mut self, host: &dyn Host, purpose: Purpose, rules: &Rules, waiting: Waiting) {
        match waiting {
            Waiting::Local(pending) => {
                if let Some(local) = self.local(purpose) {
                    local.cancel(host, rules, *pending);
                }
            }
            Waiting::Authority(waiting) => {
                if let Some(authority) = self.authority_of(waiting.client()) {
                    authority.cancel(host, waiting);
                }
            }
            Waiting::Etcd(waiting) => {
                if let Some(etcd) = self.etcd_of(waiting.client()) {
                    etcd.cancel(host, waiting);
                }
            }
        }
    }

    /// Gives a lease back. Tells of the grants in it that had ended before, as far as that is known.
    pub fn release(&mut self, host: &dyn Host, purpose: Purpose, rules: &Rules, lease: Lease) -> Vec<Grant> {
        match lease {
            Lease::Local(lease) => {
                self.local(purpose).map(|local| local.release(host, rules, lease)).unwrap_or_default()
            }
            Lease::Authority(lease) => {
                self.authority_of(lease.client()).map(|authority| authority.release(host, lease)).unwrap_or_default()
            }
            Lease::Etcd(lease) => {
                self.etcd_of(lease.client()).map(|etcd| etcd.release(host, lease)).unwrap_or_default()
            }
        }
    }

    /// The lock of a lease that was lost, as far as the backend knows without asking anybody.
    pub fn lost(&mut self, host: &dyn Host, lease: &Lease) -> Option<(LockName, Loss)> {
        let loss = match lease {
            Lease::Local(_) => None,
            Lease::Authority(lease) => self.authority_of(lease.client())?.loss(host, lease),
            Lease::Etcd(lease) => self.etcd_of(lease.client())?.loss(host, lease),
        }?;
        lease.grants().first().map(|grant| (grant.name.clone(), loss))
    }
}
