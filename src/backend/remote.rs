//! What the backends that ask others have in common: who waits and who holds there, how a root is had to send what a stream may
//! not, and what operators are told. Nothing is sent, and nothing of a protocol is known here.

use interlock_core::{Cause, Duration, Grant, LockName, Mode, OwnerId, Refusal, Time};

use crate::answer::Reject;
use crate::host::{ContextId, Host, HostError, QueueId};

/// A request that waits for an answer, or for its turn.
#[derive(Debug)]
pub struct Waiting {
    pub(super) client: u32,
    pub(super) stream: ContextId,
    pub(super) owner: OwnerId,
    pub(super) first: Option<(LockName, Mode)>,
}

impl Waiting {
    /// Which client it waits at.
    pub fn client(&self) -> u32 {
        self.client
    }

    /// Who waits.
    pub fn owner(&self) -> &OwnerId {
        &self.owner
    }

    /// The first lock that it takes: for which of them it waits may be known only to who is asked.
    pub fn waits_for(&self) -> Option<(&LockName, Mode)> {
        self.first.as_ref().map(|(lock, mode)| (lock, *mode))
    }

    /// Its refusal.
    pub(super) fn refusal(&self, cause: Cause) -> Reject {
        match &self.first {
            Some((lock, mode)) => {
                Reject::Core(Refusal { lock: lock.clone(), mode: *mode, owner: self.owner.clone(), cause })
            }
            None => Reject::Malformed { detail: String::from("it names no lock") },
        }
    }

    /// Its refusal where who is asked did not do its part.
    pub(super) fn unavailable(&self, detail: &str) -> Reject {
        self.refusal(Cause::Backend { detail: detail.to_owned() })
    }
}

/// A lease that a request holds.
#[derive(Debug)]
pub struct Lease {
    pub(super) client: u32,
    pub(super) stream: ContextId,
    pub(super) owner: OwnerId,
    pub(super) grants: Vec<Grant>,
}

impl Lease {
    /// Which client holds it.
    pub fn client(&self) -> u32 {
        self.client
    }

    /// Who holds.
    pub fn owner(&self) -> &OwnerId {
        &self.owner
    }

    /// What it holds.
    pub fn grants(&self) -> &[Grant] {
        &self.grants
    }
}

/// What happened that operators want to know.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// How long who was asked took for calls, its waiting aside.
    pub took: Vec<Duration>,
    /// How it failed, each in one word.
    pub failures: Vec<&'static str>,
}

/// A client of those who are asked, as the filter drives all of them alike.
pub trait Remote {
    /// How it has a root called.
    fn root_call(&mut self) -> &mut RootCall;

    /// Whether something is to be sent that a root has to send.
    fn has_to_send(&self) -> bool;

    /// Does what it is time for; then see [`Remote::flush`].
    fn tick(&mut self, host: &dyn Host);

    /// When [`Remote::tick`] has something to do.
    fn next_due(&self) -> Time;

    /// Sends what is to be sent, from a callback of a root.
    fn flush(&mut self, host: &dyn Host);

    /// The streams of which something was decided since this was last asked.
    fn woken(&mut self) -> Vec<ContextId>;

    /// What happened since this was last asked.
    fn take_notes(&mut self) -> Notes;

    /// Has a root send what is to be sent, from a callback of a stream.
    ///
    /// # Errors
    /// Those of the host. The next tick sends it.
    fn call_root(&mut self, host: &dyn Host) -> Result<(), HostError> {
        if self.has_to_send() { self.root_call().call(host) } else { Ok(()) }
    }

    /// Makes the root whose callback runs the one that is called.
    ///
    /// # Errors
    /// Those of the host.
    fn listen(&mut self, host: &dyn Host) -> Result<(), HostError> {
        self.root_call().listen(host).map(drop)
    }

    /// Whether a root is called by this queue; empties it then.
    fn heard(&mut self, host: &dyn Host, queue: QueueId) -> bool {
        self.root_call().heard(host, queue)
    }
}

/// A queue of the VM's own, by which a callback of a stream has a root called: the host tells nobody of an answer to a stream
/// that has gone.
pub struct RootCall {
    name: String,
    queue: Option<QueueId>,
    /// Whether one was called and has not come yet.
    called: bool,
}

impl RootCall {
    /// By that name, which nobody else has. Nothing is registered yet.
    pub(super) fn new(name: String) -> Self {
        RootCall { name, queue: None, called: false }
    }

    /// Has a root called, if none was.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn call(&mut self, host: &dyn Host) -> Result<(), HostError> {
        if self.called {
            return Ok(());
        }
        let queue = match self.queue {
            Some(queue) => queue,
            None => self.listen(host)?,
        };
        host.enqueue(queue, b"!")?;
        self.called = true;
        Ok(())
    }

    /// A root has come.
    pub(super) fn came(&mut self) {
        self.called = false;
    }

    /// Makes the root whose callback runs the one that is called.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn listen(&mut self, host: &dyn Host) -> Result<QueueId, HostError> {
        let queue = host.register_queue(&self.name)?;
        self.queue = Some(queue);
        Ok(queue)
    }

    /// Whether a root is called by this queue; empties it then.
    pub(super) fn heard(&self, host: &dyn Host, queue: QueueId) -> bool {
        let mine = self.queue == Some(queue);
        if mine {
            while let Ok(Some(_)) = host.dequeue(queue) {}
        }
        mine
    }
}
