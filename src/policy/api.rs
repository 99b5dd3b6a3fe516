//! The part of a policy that says whether and where the lease API is served, and to whom its administration.

use sha2::{Digest, Sha256};

use super::reader::{PolicyError, Reader};
use super::{keys, matches, parse};

/// Where the API is, unless the policy says otherwise.
pub(super) const PREFIX: &str = "/interlock/v1";

/// The lease API as a policy has it.
#[derive(Clone)]
pub struct Api {
    /// What all its paths begin with; no slash at its end.
    pub prefix: String,
    /// Patterns of the SPIFFE IDs of administrators.
    principals: Vec<String>,
    /// The digest of the token that makes an administrator.
    token: Option<[u8; 32]>,
}

impl std::fmt::Debug for Api {
    /// Without anything that says something of the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api")
            .field("prefix", &self.prefix)
            .field("principals", &self.principals)
            .finish_non_exhaustive()
    }
}

impl Api {
    pub(super) fn read(at: &Reader<'_>, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, PolicyError> {
        let object = at.object(&["prefix", "admin"])?;
        let prefix = object.read("prefix", prefix)?;
        let mut api = Api { prefix: prefix.unwrap_or_else(|| PREFIX.to_owned()), principals: Vec::new(), token: None };
        if let Some(admin) = object.get("admin") {
            let object = admin.object(&["principals", "token"])?;
            if let Some(place) = object.get("principals") {
                api.principals = parse::patterns(&place)?;
            }
            if let Some(place) = object.get("token") {
                let (place, token) = keys::secret(&place, env)?;
                if token.len() < keys::MIN_SECRET {
                    let problem = format!("has {} bytes, a token has at least {}", token.len(), keys::MIN_SECRET);
                    return Err(place.error(problem));
                }
                api.token = Some(Sha256::digest(&token).into());
            }
        }
        Ok(api)
    }

    /// What stands behind the prefix in the path of a request to the API; none for any other request.
    pub fn rest<'a>(&self, path: &'a [u8]) -> Option<&'a [u8]> {
        path.strip_prefix(self.prefix.as_bytes())?.strip_prefix(b"/")
    }

    /// Whether a caller is an administrator: by its SPIFFE ID, or by what it wrote into `authorization`. Tokens are
    /// compared by their digests, so that the time it takes says nothing.
    pub fn is_admin(&self, principal: Option<&[u8]>, authorization: Option<&[u8]>) -> bool {
        let named = |caller: &[u8]| self.principals.iter().any(|pattern| matches(pattern.as_bytes(), caller));
        let bearer = authorization.and_then(|value| {
            let (scheme, token) = value.split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"Bearer ").then_some(token)
        });
        let digest = bearer.map(|token| <[u8; 32]>::from(Sha256::digest(token)));
        principal.is_some_and(named) || (digest.is_some() && digest == self.token)
    }
}

/// What all paths of an API begin with.
pub(super) fn prefix(at: Reader<'_>) -> Result<String, PolicyError> {
    let text = at.text()?;
    let fits = text.len() > 1
        && text.len() <= 256
        && text.starts_with('/')
        && !text.ends_with('/')
        && text.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#%".contains(&byte));
    if fits {
        return Ok(text.to_owned());
    }
    Err(at.error("is no prefix of paths; write one such as \"/interlock/v1\", with no slash at its end"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::policy::Policy;

    fn api(api: Value) -> Result<Api, String> {
        let env = |name: &str| (name == "TOKEN").then(|| "a token of some length".to_owned());
        let policy = json!({ "api": api });
        let policy = Policy::parse(policy.to_string().as_bytes(), &env).map_err(|error| error.to_string())?;
        Ok(policy.api.unwrap())
    }

    #[test]
    fn paths_under_the_prefix_are_the_apis() {
        let api = api(json!({})).unwrap();
        assert_eq!(api.rest(b"/interlock/v1/health"), Some(&b"health"[..]));
        assert_eq!(api.rest(b"/interlock/v1/"), Some(&b""[..]));
        for other in ["/interlock/v1", "/interlock/v10/health", "/", "", "/x/interlock/v1/health"] {
            assert_eq!(api.rest(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn an_administrator_has_the_name_or_the_token() {
        let neither = api(json!({})).unwrap();
        assert!(!neither.is_admin(Some(b"spiffe://mesh/ns/ops/sa/a"), Some(b"Bearer ")));
        let both = json!({ "admin": { "principals": ["spiffe://mesh/ns/ops/*"], "token": { "env": "TOKEN" } } });
        let both = api(both).unwrap();
        assert!(both.is_admin(Some(b"spiffe://mesh/ns/ops/sa/a"), None));
        assert!(!both.is_admin(Some(b"spiffe://mesh/ns/pay/sa/a"), None));
        assert!(both.is_admin(None, Some(b"bearer a token of some length")));
        for wrong in ["Bearer a token", "Bearer", "Basic a token of some length", "", "Bearer  a token of some length"]
        {
            assert!(!both.is_admin(None, Some(wrong.as_bytes())), "{wrong}");
        }
        assert!(!format!("{both:?}").contains("token"), "{both:?}");
    }

    #[test]
    fn a_wrong_api_is_refused() {
        for (wrong, line) in [
            (json!(true), "api: is a boolean; write an object"),
            (
                json!({ "prefix": "/a/" }),
                "api.prefix: is no prefix of paths; write one such as \"/interlock/v1\", with no slash at its end",
            ),
            (
                json!({ "prefix": "a" }),
                "api.prefix: is no prefix of paths; write one such as \"/interlock/v1\", with no slash at its end",
            ),
            (
                json!({ "admin": { "token": { "base64": "c2hvcnQ=" } } }),
                "api.admin.token.base64: has 5 bytes, a token has at least 16",
            ),
            (
                json!({ "admin": { "principals": [] } }),
                "api.admin.principals: is empty; name a pattern, or leave the field out",
            ),
        ] {
            assert_eq!(api(wrong).unwrap_err(), line);
        }
    }
}
