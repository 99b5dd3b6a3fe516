//! What a request to the lease API asks for: first its target, from method and path; then, where it has one, its body.

use interlock_core::{Duration, LeaseId, LockName, Mode, NameError, OwnerId};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::MAX_BODY;
use crate::annotation::Wanted;
use crate::policy::parse_duration;

/// Locks on one page, where the caller does not say.
const PAGE: usize = 100;

/// The most locks on one page.
const LONGEST_PAGE: usize = 1000;

/// The longest that a request says of what it is for, in characters.
pub const MOST_FOR: usize = 128;

/// The longest complaint about JSON, in characters.
const MOST_COMPLAINT: usize = 200;

/// A request that is wrong before anybody looks at the table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// It is there, and cannot be called so.
    #[error("this can be called by {allow}")]
    Method {
        /// How it can be called.
        allow: &'static str,
    },
    /// The body is longer than [`MAX_BODY`].
    #[error("the body has more than {MAX_BODY} bytes")]
    TooLarge,
    /// Something in the path, the query or the body is wrong.
    #[error("{0}")]
    Malformed(String),
}

impl ApiError {
    /// The HTTP status.
    pub fn status(&self) -> u16 {
        match self {
            ApiError::NotFound(_) => 404,
            ApiError::Method { .. } => 405,
            ApiError::TooLarge => 413,
            ApiError::Malformed(_) => 400,
        }
    }

    /// The name of the problem in its type.
    pub fn slug(&self) -> &'static str {
        match self {
            ApiError::NotFound(_) => "not-found",
            ApiError::Method { .. } => "method-not-allowed",
            ApiError::TooLarge => "body-too-large",
            ApiError::Malformed(_) => "malformed-request",
        }
    }
}

/// An identity as its holder spells it. Whoever knows it can renew and release the lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseName(String);

impl LeaseName {
    /// Reads one: 16 to 64 of `A-Z a-z 0-9 _ -`.
    ///
    /// # Errors
    /// That it is none.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let fits = (16..=64).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
        if fits {
            return Ok(LeaseName(text.to_owned()));
        }
        Err(ApiError::Malformed(String::from("a lease id has 16 to 64 of A-Z a-z 0-9 _ -")))
    }

    /// As the caller spells it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The identity by which the table knows the lease. It cannot be turned back, so that nobody who reads the table can
    /// use a lease of somebody else's; and nobody can find two spellings for one.
    pub fn id(&self) -> LeaseId {
        let digest = Sha256::new().chain_update(b"interlock-lease").chain_update(self.0.as_bytes()).finalize();
        let (first, _) = digest.split_first_chunk::<16>().unwrap_or((&[0; 16], &[]));
        LeaseId(u128::from_be_bytes(*first))
    }
}

/// What a request is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `PUT leases/{id}`: with a body, [`Put`].
    Acquire(LeaseName),
    /// `POST leases/renew`: with a body, [`Renew`].
    Renew,
    /// `DELETE leases/{id}`
    Release(LeaseName),
    /// `GET leases/{id}`
    Lease(LeaseName),
    /// `GET locks`
    Locks {
        /// Where the page begins.
        from: u32,
        /// How many locks it has at least, if there are as many.
        limit: usize,
    },
    /// `GET locks/{name}`
    Lock(LockName),
    /// `DELETE locks/{name}`
    Break(LockName),
    /// `GET graph`
    Graph,
    /// `GET deadlocks`
    Deadlocks,
    /// `GET health`
    Health,
}

impl Target {
    /// Reads the target of a request: its method, and its path and query behind the API's prefix.
    ///
    /// # Errors
    /// There is no such thing, or it cannot be called so.
    pub fn read(method: &[u8], rest: &[u8]) -> Result<Self, ApiError> {
        let unknown =
            || ApiError::NotFound(String::from("the lease API has leases, locks, graph, deadlocks and health"));
        let rest = core::str::from_utf8(rest).map_err(|_| unknown())?;
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (kind, name) = match path.split_once('/') {
            Some((kind, name)) => (kind, Some(name)),
            None => (path, None),
        };
        match (kind, name) {
            ("leases", Some("renew")) => only(method, b"POST", "POST", || Ok(Target::Renew)),
            ("leases", Some(id)) => match method {
                b"PUT" => LeaseName::parse(id).map(Target::Acquire),
                b"DELETE" => LeaseName::parse(id).map(Target::Release),
                b"GET" => LeaseName::parse(id).map(Target::Lease),
                _ => Err(ApiError::Method { allow: "GET, PUT, DELETE" }),
            },
            ("locks", None) => only(method, b"GET", "GET", || page(query)),
            ("locks", Some(name)) => {
                let name = || LockName::parse(name).map_err(|error| ApiError::Malformed(format!("lock name: {error}")));
                match method {
                    b"GET" => name().map(Target::Lock),
                    b"DELETE" => name().map(Target::Break),
                    _ => Err(ApiError::Method { allow: "GET, DELETE" }),
                }
            }
            ("graph", None) => only(method, b"GET", "GET", || Ok(Target::Graph)),
            ("deadlocks", None) => only(method, b"GET", "GET", || Ok(Target::Deadlocks)),
            ("health", None) => only(method, b"GET", "GET", || Ok(Target::Health)),
            _ => Err(unknown()),
        }
    }

    /// Whether the body says what is wanted.
    pub fn has_body(&self) -> bool {
        matches!(self, Target::Acquire(_) | Target::Renew)
    }

    /// Whether it is for administrators only.
    pub fn is_admin(&self) -> bool {
        matches!(self, Target::Break(_))
    }
}

fn only(
    method: &[u8],
    wanted: &[u8],
    allow: &'static str,
    target: impl FnOnce() -> Result<Target, ApiError>,
) -> Result<Target, ApiError> {
    if method == wanted { target() } else { Err(ApiError::Method { allow }) }
}

fn page(query: &str) -> Result<Target, ApiError> {
    let (mut from, mut limit) = (0, PAGE);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("page", value)) => {
                from = value
                    .parse()
                    .map_err(|_| ApiError::Malformed(String::from("page is no page that was given out")))?;
            }
            Some(("limit", value)) => {
                limit = value.parse().ok().filter(|limit| (1..=LONGEST_PAGE).contains(limit)).ok_or_else(|| {
                    ApiError::Malformed(format!("limit is not a whole number from 1 to {LONGEST_PAGE}"))
                })?;
            }
            _ => return Err(ApiError::Malformed(String::from("the query has page and limit"))),
        }
    }
    Ok(Target::Locks { from, limit })
}

/// The body of a request for a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Put {
    /// For whom.
    pub owner: OwnerId,
    /// The locks; what is not said of them is the policy's.
    pub wanted: Vec<Wanted>,
    /// What it is for, for people to read.
    pub asked_by: Option<String>,
    /// The receipt of a lease that is asserted again.
    pub receipt: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with owner and locks")]
struct PutBody {
    owner: String,
    locks: Vec<LockBody>,
    wait: Option<String>,
    ttl: Option<String>,
    receipt: Option<String>,
    #[serde(rename = "for")]
    asked_by: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with name")]
struct LockBody {
    name: String,
    mode: Option<String>,
    wait: Option<String>,
}

impl Put {
    /// Reads the body.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn read(body: &[u8]) -> Result<Self, ApiError> {
        let PutBody { owner, locks, wait, ttl, receipt, asked_by } = json(body)?;
        let owner = owner_named(&owner)?;
        let wait = duration("wait", wait)?;
        let ttl = duration("ttl", ttl)?;
        if ttl.is_some_and(|ttl| ttl.is_zero()) {
            return Err(ApiError::Malformed(String::from("ttl: must be above 0")));
        }
        if asked_by.as_ref().is_some_and(|text| text.chars().count() > MOST_FOR) {
            return Err(ApiError::Malformed(format!("for: has at most {MOST_FOR} characters")));
        }
        if locks.is_empty() {
            return Err(ApiError::Malformed(String::from("locks: is empty; name one lock at least")));
        }
        let lock =
            |(index, lock): (usize, &LockBody)| {
                let at = format!("locks[{index}]");
                let name = LockName::parse(&lock.name)
                    .map_err(|error: NameError| ApiError::Malformed(format!("{at}.name: {error}")))?;
                let mode =
                    lock.mode.as_deref().map(|mode| mode.parse::<Mode>()).transpose().map_err(|_| {
                        ApiError::Malformed(format!("{at}.mode: is no mode; write exclusive or shared"))
                    })?;
                let own = duration(&format!("{at}.wait"), lock.wait.clone())?;
                Ok(Wanted { mode, wait: own.or(wait), ttl, ..Wanted::new(name) })
            };
        let wanted = locks.iter().enumerate().map(lock).collect::<Result<_, ApiError>>()?;
        Ok(Put { owner, wanted, asked_by, receipt })
    }
}

/// An owner as a body names it. What a request names its owner by is percent-encoded (see `annotation::owner`): a lease whose owner has
/// other bytes in its name could be met by no request, so it would neither be re-entered nor pass a guard.
fn owner_named(text: &str) -> Result<OwnerId, ApiError> {
    if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        let line = "owner: has spaces, or what is not printable ASCII; percent-encode it, as requests do (\"%20\" for a space)";
        return Err(ApiError::Malformed(String::from(line)));
    }
    OwnerId::new(text).ok_or_else(|| ApiError::Malformed(format!("owner: has 1 to {} bytes", OwnerId::MAX)))
}

/// The body of a renewal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renew {
    /// The leases, each with its receipt where the caller sent it.
    pub leases: Vec<(LeaseName, Option<String>)>,
    /// Their TTL from now on, if it is to change.
    pub ttl: Option<Duration>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with leases")]
struct RenewBody {
    leases: Vec<RenewItem>,
    ttl: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with id")]
struct RenewItem {
    id: String,
    receipt: Option<String>,
}

impl Renew {
    /// Reads the body.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn read(body: &[u8]) -> Result<Self, ApiError> {
        let RenewBody { leases, ttl } = json(body)?;
        let ttl = duration("ttl", ttl)?;
        if ttl.is_some_and(|ttl| ttl.is_zero()) {
            return Err(ApiError::Malformed(String::from("ttl: must be above 0")));
        }
        let lease = |(index, item): (usize, RenewItem)| {
            let name = LeaseName::parse(&item.id)
                .map_err(|error| ApiError::Malformed(format!("leases[{index}].id: {error}")))?;
            Ok((name, item.receipt))
        };
        Ok(Renew { leases: leases.into_iter().enumerate().map(lease).collect::<Result<_, ApiError>>()?, ttl })
    }
}

fn json<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ApiError> {
    if body.len() > MAX_BODY {
        return Err(ApiError::TooLarge);
    }
    // The parser quotes fields that it does not know, whatever is in them and however long they are.
    serde_json::from_slice(body).map_err(|error| {
        let line: String = error.to_string().escape_debug().take(MOST_COMPLAINT).collect();
        ApiError::Malformed(format!("body: {line}"))
    })
}

fn duration(field: &str, text: Option<String>) -> Result<Option<Duration>, ApiError> {
    let parse =
        |text: String| parse_duration(&text).map_err(|problem| ApiError::Malformed(format!("{field}: {problem}")));
    text.map(parse).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef";

    fn id() -> LeaseName {
        LeaseName::parse(ID).unwrap()
    }

    fn read(method: &str, rest: &str) -> Result<Target, ApiError> {
        Target::read(method.as_bytes(), rest.as_bytes())
    }

    #[test]
    fn every_call_has_its_path() {
        let lock = || LockName::parse("stock/7/a%2Fb").unwrap();
        for (method, rest, target) in [
            ("PUT", "leases/0123456789abcdef", Target::Acquire(id())),
            ("POST", "leases/renew", Target::Renew),
            ("DELETE", "leases/0123456789abcdef", Target::Release(id())),
            ("GET", "leases/0123456789abcdef", Target::Lease(id())),
            ("GET", "locks", Target::Locks { from: 0, limit: 100 }),
            ("GET", "locks?page=512&limit=7", Target::Locks { from: 512, limit: 7 }),
            ("GET", "locks/stock/7/a%2fb", Target::Lock(lock())),
            ("DELETE", "locks/stock/7/a%2Fb", Target::Break(lock())),
            ("GET", "graph", Target::Graph),
            ("GET", "deadlocks?", Target::Deadlocks),
            ("GET", "health", Target::Health),
        ] {
            assert_eq!(read(method, rest), Ok(target), "{method} {rest}");
        }
    }

    #[test]
    fn what_there_is_not_is_said_so() {
        for (method, rest, status) in [
            ("GET", "", 404),
            ("GET", "lease", 404),
            ("GET", "graph/x", 404),
            ("GET", "leases", 404),
            ("GET", "leases/short", 400),
            ("PUT", "leases/0123456789abcde%66", 400),
            ("POST", "leases/0123456789abcdef", 405),
            ("GET", "leases/renew", 405),
            ("POST", "locks", 405),
            ("PUT", "locks/a", 405),
            ("GET", "locks/", 400),
            ("GET", "locks/a//b", 400),
            ("GET", "locks?limit=0", 400),
            ("GET", "locks?limit=1001", 400),
            ("GET", "locks?page=-1", 400),
            ("GET", "locks?order=age", 400),
            ("DELETE", "health", 405),
        ] {
            assert_eq!(read(method, rest).unwrap_err().status(), status, "{method} {rest}");
        }
        assert_eq!(Target::read(b"GET", b"\xff").unwrap_err().status(), 404);
    }

    #[test]
    fn a_request_for_a_lease() {
        let put = Put::read(br#"{"owner":"t1","locks":[{"name":"order/1"},{"name":"stock/1","mode":"shared"}],"wait":"1.5s","ttl":"250ms"}"#);
        let put = put.unwrap();
        assert_eq!(put.owner.as_str(), "t1");
        let [order, stock] = &put.wanted[..] else { panic!() };
        assert_eq!((order.name.as_str(), order.mode, stock.mode), ("order/1", None, Some(Mode::Shared)));
        assert_eq!((order.wait, stock.ttl), (Some(Duration::from_millis(1500)), Some(Duration::from_millis(250))));
        assert_eq!(put.receipt, None);
    }

    use crate::annotation::owner::OwnerSource;

    const OWNER: &str =
        "owner: has spaces, or what is not printable ASCII; percent-encode it, as requests do (\"%20\" for a space)";

    #[test]
    fn the_owner_of_a_lease_can_be_named_by_a_request() {
        let put = Put::read(br#"{"owner":"nightly%20report","locks":[{"name":"a"}]}"#).unwrap();
        let named = OwnerSource::LockOwner.read(b"nightly report");
        assert_eq!(Some(put.owner), named);
    }

    #[test]
    fn a_bad_body_is_told_what_is_wrong_and_where() {
        for (body, line) in [
            (r#"{"owner":"","locks":[{"name":"a"}]}"#, "owner: has 1 to 256 bytes"),
            (r#"{"owner":"nightly report","locks":[{"name":"a"}]}"#, OWNER),
            (r#"{"owner":"a\u0000","locks":[{"name":"a"}]}"#, OWNER),
            (r#"{"owner":"ä","locks":[{"name":"a"}]}"#, OWNER),
            (r#"{"owner":"a","locks":[]}"#, "locks: is empty; name one lock at least"),
            (
                r#"{"owner":"a","locks":[{"name":"a"},{"name":"a//b"}]}"#,
                "locks[1].name: a lock name cannot have an empty segment (byte 2)",
            ),
            (
                r#"{"owner":"a","locks":[{"name":"a","mode":"x"}]}"#,
                "locks[0].mode: is no mode; write exclusive or shared",
            ),
            (r#"{"owner":"a","locks":[{"name":"a"}],"ttl":"0s"}"#, "ttl: must be above 0"),
            (
                r#"{"owner":"a","locks":[{"name":"a"}],"wait":"2"}"#,
                "wait: is not a duration; write a number and us, ms, s, m or h, such as \"1.5s\" or \"250ms\"",
            ),
            (
                r#"{"owner":"a","locks":[{"name":"a"}],"id":"x"}"#,
                "body: unknown field `id`, expected one of `owner`, `locks`, `wait`, `ttl`, `receipt`, `for` at line 1 column 40",
            ),
            ("", "body: EOF while parsing a value at line 1 column 0"),
            ("[]", "body: invalid length 0, expected an object with owner and locks at line 1 column 2"),
        ] {
            assert_eq!(Put::read(body.as_bytes()).unwrap_err().to_string(), line);
        }
        let strange = format!("{{\"{}\":1}}", "\u{10ffff}".repeat(300));
        assert!(Put::read(strange.as_bytes()).unwrap_err().to_string().chars().count() <= 206);
        assert_eq!(Put::read(&[b' '; MAX_BODY + 1]).unwrap_err().status(), 413);
        let deep = "[".repeat(10_000);
        assert_eq!(Put::read(deep.as_bytes()).unwrap_err().status(), 400);
    }

    #[test]
    fn a_renewal() {
        let renew = Renew::read(
            br#"{"leases":[{"id":"0123456789abcdef"},{"id":"0123456789abcdeg","receipt":"r"}],"ttl":"3s"}"#,
        );
        let renew = renew.unwrap();
        assert_eq!(renew.leases[0], (id(), None));
        assert_eq!(renew.leases[1].1.as_deref(), Some("r"));
        assert_eq!(renew.ttl, Some(Duration::from_secs(3)));
        let bad = Renew::read(br#"{"leases":[{"id":"x"}]}"#).unwrap_err().to_string();
        assert_eq!(bad, "leases[0].id: a lease id has 16 to 64 of A-Z a-z 0-9 _ -");
    }

    #[test]
    fn the_table_does_not_know_an_identity_as_its_holder_spells_it() {
        assert_ne!(id().id(), LeaseName::parse("0123456789abcdeg").unwrap().id());
        assert_eq!(id().id(), id().id());
    }
}
