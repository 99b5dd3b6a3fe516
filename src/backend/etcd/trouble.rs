//! What can go wrong with etcd, told apart by the status of a call and the words that go with it.
//!
//! etcd's words are those of its `api/v3rpc/rpctypes`; they have stayed the same from 3.4 on.

use core::fmt;

/// How a call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Nobody took the call, or the answer was cut.
    Unreachable,
    /// No answer in time.
    Timeout,
    /// The members have no leader, or are about to have another.
    NoLeader,
    /// The member that was asked has no quorum to ask.
    Stopped,
    /// Its database is full.
    NoSpace,
    /// Too many requests at once.
    Overloaded,
    /// The user may not do that under the prefix.
    Permission,
    /// Name, password or token are wrong, or are missing.
    Auth,
    /// The token is no longer good.
    Token,
    /// The lease is gone.
    NoLease,
    /// The revision has been compacted away.
    Compacted,
    /// Its data is damaged.
    Corrupt,
    /// The cluster is not in Envoy's configuration, or Envoy does not call.
    Dispatch,
    /// Nobody told of an answer.
    NoAnswer,
    /// An answer that cannot be read.
    Malformed,
    /// A key that cannot be read.
    Foreign,
    /// The cluster serves no etcd.
    NotEtcd,
    /// Any other status.
    Status(u32),
}

impl Trouble {
    /// What a failed call says.
    pub fn read(status: u32, words: &str) -> Self {
        let has = |part| words.contains(part);
        match status {
            4 if has("etcdserver") => Trouble::Stopped,
            4 => Trouble::Timeout,
            5 if has("lease not found") => Trouble::NoLease,
            7 => Trouble::Permission,
            8 if has("database space exceeded") => Trouble::NoSpace,
            8 => Trouble::Overloaded,
            11 => Trouble::Compacted,
            12 => Trouble::NotEtcd,
            14 if has("leader") => Trouble::NoLeader,
            14 if has("request timed out") || has("stopped") => Trouble::Stopped,
            // Envoy's own, where the cluster is not there.
            14 if has("Cluster not available") => Trouble::Dispatch,
            14 => Trouble::Unreachable,
            15 => Trouble::Corrupt,
            16 => Trouble::Token,
            3 | 9
                if has("authentication failed")
                    || has("user name is empty")
                    || has("authentication is not enabled") =>
            {
                Trouble::Auth
            }
            3 | 9 if has("revision of auth store is old") => Trouble::Token,
            status => Trouble::Status(status),
        }
    }

    /// The failure in metrics.
    pub const fn reason(self) -> &'static str {
        match self {
            Trouble::Unreachable => "unreachable",
            Trouble::Timeout => "timeout",
            Trouble::NoLeader => "no-leader",
            Trouble::Stopped => "no-quorum",
            Trouble::NoSpace => "no-space",
            Trouble::Overloaded => "overloaded",
            Trouble::Permission => "permission",
            Trouble::Auth => "auth",
            Trouble::Token => "token",
            Trouble::NoLease => "no-lease",
            Trouble::Compacted => "compacted",
            Trouble::Corrupt => "corrupt",
            Trouble::Dispatch => "dispatch",
            Trouble::NoAnswer => "no-answer",
            Trouble::Malformed => "malformed",
            Trouble::Foreign => "foreign-key",
            Trouble::NotEtcd => "not-etcd",
            Trouble::Status(_) => "status",
        }
    }

    /// Whether asking again soon will have the same answer.
    pub const fn lasts(self) -> bool {
        matches!(
            self,
            Trouble::NoSpace
                | Trouble::Permission
                | Trouble::Auth
                | Trouble::Corrupt
                | Trouble::Dispatch
                | Trouble::Foreign
                | Trouble::NotEtcd
        )
    }

    /// Whether the call may have done its work all the same.
    pub const fn is_doubtful(self) -> bool {
        !matches!(
            self,
            Trouble::NoSpace
                | Trouble::Permission
                | Trouble::Auth
                | Trouble::Token
                | Trouble::NoLease
                | Trouble::Dispatch
                | Trouble::NotEtcd
        )
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Trouble::Unreachable => "etcd cannot be reached",
            Trouble::Timeout => "etcd did not answer in time",
            Trouble::NoLeader => "etcd has no leader",
            Trouble::Stopped => "etcd did not reach a quorum of its members in time",
            Trouble::NoSpace => "etcd's database is full (NOSPACE): compact, defragment and disarm the alarm",
            Trouble::Overloaded => "etcd has too many requests",
            Trouble::Permission => "the etcd user may not read and write under the prefix",
            Trouble::Auth => "etcd refuses the user name and password, or asks for them",
            Trouble::Token => "etcd refuses the token",
            Trouble::NoLease => "the session's etcd lease has ended",
            Trouble::Compacted => "etcd has compacted the revision away",
            Trouble::Corrupt => "etcd says that its data is corrupt",
            Trouble::Dispatch => "Envoy does not call etcd: is the cluster of backend.etcd in its configuration?",
            Trouble::NoAnswer => "nothing was heard of the call of etcd",
            Trouble::Malformed => "etcd's answer cannot be read",
            Trouble::Foreign => "a key under the prefix in etcd is another program's, or a newer version's",
            Trouble::NotEtcd => "the cluster of backend.etcd serves no etcd",
            Trouble::Status(status) => return write!(f, "etcd answered with the gRPC status {status}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etcds_words_are_told_apart() {
        for (status, words, trouble) in [
            (14, "etcdserver: no leader", Trouble::NoLeader),
            (14, "etcdserver: leader changed", Trouble::NoLeader),
            (14, "etcdserver: request timed out", Trouble::Stopped),
            (14, "upstream connect error or disconnect/reset before headers", Trouble::Unreachable),
            (14, "Cluster not available", Trouble::Dispatch),
            (8, "etcdserver: mvcc: database space exceeded", Trouble::NoSpace),
            (8, "etcdserver: too many requests", Trouble::Overloaded),
            (7, "etcdserver: permission denied", Trouble::Permission),
            (3, "etcdserver: authentication failed, invalid user ID or password", Trouble::Auth),
            (3, "etcdserver: user name is empty", Trouble::Auth),
            (9, "etcdserver: authentication is not enabled", Trouble::Auth),
            (16, "etcdserver: invalid auth token", Trouble::Token),
            (5, "etcdserver: requested lease not found", Trouble::NoLease),
            (11, "etcdserver: mvcc: required revision has been compacted", Trouble::Compacted),
            (4, "", Trouble::Timeout),
            (12, "", Trouble::NotEtcd),
            (2, "", Trouble::Status(2)),
        ] {
            let read = Trouble::read(status, words);
            assert_eq!(read, trouble, "{status} {words}");
            assert!(!read.reason().is_empty() && !read.to_string().is_empty());
        }
        assert!(Trouble::NoSpace.lasts() && !Trouble::NoLeader.lasts());
        assert!(Trouble::Timeout.is_doubtful() && !Trouble::NoLease.is_doubtful());
    }
}
