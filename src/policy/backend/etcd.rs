//! The part of a policy that says how etcd is reached.

use std::sync::Arc;
use std::time::Duration;

use super::super::keys::secret;
use super::super::reader::{PolicyError, Reader};

/// How long etcd has to answer a call, where the policy does not say.
const TIMEOUT: Duration = Duration::from_secs(1);

/// How long a session outlives its last renewal, where the policy does not say.
const SESSION_TTL: Duration = Duration::from_secs(10);

/// The shortest timeout, and the longest.
const TIMEOUTS: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(30));

/// The shortest session and the longest: etcd itself makes less than the election of a leader takes longer.
const SESSIONS: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(600));

/// The longest name of a cluster, and of an authority: together they must fit a message with short lengths.
const NAME: usize = 60;

/// etcd, as a proxy reaches it.
#[derive(Clone, PartialEq, Eq)]
pub struct Etcd {
    /// The cluster that serves it, in Envoy's configuration.
    pub cluster: String,
    /// The `:authority` of its calls; empty: that of the cluster.
    pub authority: String,
    /// What all keys begin with; no slash at its end.
    pub prefix: String,
    /// What a proxy shows to be let in.
    pub access: Access,
    /// How long the locks of a worker outlive its last sign of life. Whole seconds.
    pub session_ttl: Duration,
    /// How long etcd has to answer a call.
    pub timeout: Duration,
}

/// What a proxy shows to be let in.
#[derive(Clone, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    Open,
    /// A token that somebody made, such as a JWT.
    Token(Arc<str>),
    /// A name and a password, for which etcd gives a token.
    User {
        /// The name.
        name: String,
        /// The password.
        password: Arc<str>,
    },
}

impl std::fmt::Debug for Access {
    /// Secrets never reach a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Access::Open => f.write_str("open"),
            Access::Token(_) => f.write_str("token"),
            Access::User { name, .. } => write!(f, "user {name}"),
        }
    }
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "etcd at {} under {} ({:?})", self.cluster, self.prefix, self.access)
    }
}

/// How etcd is reached.
pub(super) fn etcd(at: &Reader<'_>, env: &dyn Fn(&str) -> Option<String>) -> Result<Etcd, PolicyError> {
    let fields = ["cluster", "authority", "prefix", "username", "password", "token", "session_ttl", "timeout"];
    let object = at.object(&fields)?;
    let word = |at: &Reader<'_>| match at.text()? {
        name if !name.is_empty() && name.len() <= NAME && name.bytes().all(|byte| byte.is_ascii_graphic()) => {
            Ok(name.to_owned())
        }
        _ => Err(at.error(format!("is no such name; write 1 to {NAME} letters, digits and signs, such as \"etcd\""))),
    };
    let cluster = word(&object.require("cluster")?)?;
    let authority = object.read("authority", |at| word(&at))?.unwrap_or_default();
    let prefix = object.read("prefix", |at| {
        let text = at.text()?;
        let fits = text.len() > 1 && text.len() <= 128 && text.starts_with('/') && !text.ends_with('/');
        if fits && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'!') {
            return Ok(text.to_owned());
        }
        Err(at.error("is no prefix of keys; write one such as \"/interlock\", with no slash at its end"))
    })?;
    let text = |at: Reader<'_>| {
        let (place, bytes) = secret(&at, env)?;
        let text = String::from_utf8(bytes).ok().filter(|text| !text.is_empty() && !text.contains(['\r', '\n', '\0']));
        text.map(Arc::<str>::from).ok_or_else(|| place.error("is no text of one line"))
    };
    let password = object.read("password", text)?;
    let token = object.read("token", text)?;
    let name = object.read("username", |at| match at.text()? {
        "" => Err(at.error("is empty; leave it out where etcd asks for none")),
        name => Ok(name.to_owned()),
    })?;
    let access = match (name, password, token) {
        (None, None, None) => Access::Open,
        (None, None, Some(token)) => Access::Token(token),
        (Some(name), Some(password), None) => Access::User { name, password },
        (Some(_), None, None) => return Err(object.error("has a username and no password; write both, or a token")),
        (None, Some(_), None) => return Err(object.error("has a password and no username; write both, or a token")),
        (_, _, Some(_)) => {
            return Err(object.error_at("token", "goes without username and password; leave one of them out"));
        }
    };
    let within = |(least, most): (Duration, Duration), fix: &'static str| {
        move |at: Reader<'_>| {
            let span = at.duration()?;
            if (least..=most).contains(&span) { Ok(span) } else { Err(at.error(fix)) }
        }
    };
    let timeout = object.read("timeout", within(TIMEOUTS, "is no timeout for etcd; write \"10ms\" to \"30s\""))?;
    let session_ttl = object.read("session_ttl", |at| {
        let span = within(SESSIONS, "is no life of a session; write whole seconds, \"2s\" to \"600s\"")(at)?;
        Ok(Duration::from_secs(span.as_secs()))
    })?;
    let (timeout, session_ttl) = (timeout.unwrap_or(TIMEOUT), session_ttl.unwrap_or(SESSION_TTL));
    if timeout * 2 > session_ttl {
        let problem =
            "is longer than half of session_ttl: one call that is lost would cost the session; write a shorter one";
        return Err(object.error_at("timeout", problem));
    }
    let prefix = prefix.unwrap_or_else(|| String::from("/interlock"));
    Ok(Etcd { cluster, authority, prefix, access, session_ttl, timeout })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::policy::{Backend, Policy};

    fn parse(policy: &Value) -> Result<Policy, String> {
        let env = |name: &str| (name == "PASSWORD").then(|| String::from("sesame"));
        Policy::parse(policy.to_string().as_bytes(), &env).map_err(|error| error.to_string())
    }

    fn etcd(fields: Value) -> Etcd {
        match parse(&json!({ "backend": { "etcd": fields } })).unwrap().backend {
            Backend::Etcd(at) => (*at).clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn etcd_is_a_cluster_a_prefix_what_lets_in_and_two_times() {
        let plain = etcd(json!({ "cluster": "etcd" }));
        let times = (Duration::from_secs(10), Duration::from_secs(1));
        assert_eq!((plain.session_ttl, plain.timeout), times);
        assert_eq!((&*plain.prefix, &*plain.authority, &plain.access), ("/interlock", "", &Access::Open));
        let all = etcd(json!({
            "cluster": "etcd", "authority": "etcd.internal", "prefix": "/a/b", "session_ttl": "4.9s", "timeout": "250ms",
            "username": "locks", "password": { "env": "PASSWORD" },
        }));
        assert_eq!((all.session_ttl, all.timeout), (Duration::from_secs(4), Duration::from_millis(250)));
        let access = Access::User { name: "locks".into(), password: "sesame".into() };
        assert_eq!((&*all.prefix, &*all.authority, &all.access), ("/a/b", "etcd.internal", &access));
        assert_eq!(format!("{all:?}"), "etcd at etcd under /a/b (user locks)", "no secret in it");
        let badge = etcd(json!({ "cluster": "etcd", "token": { "base64": "dG9rZW4=" } }));
        assert_eq!(badge.access, Access::Token("token".into()));
        assert_eq!(format!("{:?}", badge.access), "token");
    }

    #[test]
    fn what_etcd_cannot_be_reached_with_is_refused() {
        for (fields, line) in [
            (json!({}), "backend.etcd.cluster: is missing; it has no default"),
            (
                json!({ "cluster": "" }),
                "backend.etcd.cluster: is no such name; write 1 to 60 letters, digits and signs, such as \"etcd\"",
            ),
            (
                json!({ "cluster": "etcd", "prefix": "interlock/" }),
                "backend.etcd.prefix: is no prefix of keys; write one such as \"/interlock\", with no slash at its end",
            ),
            (
                json!({ "cluster": "etcd", "username": "locks" }),
                "backend.etcd: has a username and no password; write both, or a token",
            ),
            (
                json!({ "cluster": "etcd", "password": { "env": "PASSWORD" } }),
                "backend.etcd: has a password and no username; write both, or a token",
            ),
            (
                json!({ "cluster": "etcd", "username": "a", "password": { "env": "PASSWORD" }, "token": { "env": "PASSWORD" } }),
                "backend.etcd.token: goes without username and password; leave one of them out",
            ),
            (
                json!({ "cluster": "etcd", "timeout": "1ms" }),
                "backend.etcd.timeout: is no timeout for etcd; write \"10ms\" to \"30s\"",
            ),
            (
                json!({ "cluster": "etcd", "session_ttl": "1s" }),
                "backend.etcd.session_ttl: is no life of a session; write whole seconds, \"2s\" to \"600s\"",
            ),
            (
                json!({ "cluster": "etcd", "session_ttl": "3s", "timeout": "2s" }),
                "backend.etcd.timeout: is longer than half of session_ttl: one call that is lost would cost the session; write a \
                 shorter one",
            ),
        ] {
            assert_eq!(parse(&json!({ "backend": { "etcd": fields } })).unwrap_err(), line);
        }
        let with = |field: &str, value: Value| json!({ "backend": { "etcd": { "cluster": "etcd" } }, field: value });
        let refused = |policy: &Value, line: &str| assert_eq!(parse(policy).unwrap_err(), line);
        refused(
            &with("api", json!({})),
            "api: serves the table in this Envoy, and the locks are in etcd; leave out api, or backend",
        );
        let mut lease = with("reentrancy", json!("lease"));
        lease["keys"] = json!([{ "id": "k", "secret": { "base64": "MDEyMzQ1Njc4OWFiY2RlZg==" } }]);
        refused(&lease, "reentrancy: \"lease\" is for the local backend only; write \"owner\" or \"none\"");
        let guard = json!([{ "match": { "path": "/a" }, "lock": "a/1", "check": "owner" }]);
        refused(
            &with("guard", guard),
            "guard[0].check: \"owner\" cannot be checked where the locks are in etcd; write \"fence\"",
        );
    }
}
