//! What a request says of itself: the `lock` header and route metadata, in one syntax; and, in the modules below,
//! who its owner is and how long its caller waits.
//!
//! Pure: bytes in, values out. Must not live here: anything that calls the host, and what a policy says.

pub mod list;
pub mod owner;
pub mod timeout;

use std::collections::BTreeMap;
use std::time::Duration;

use interlock_core::{Classes, LockName, Mode, NameError};
use sfv::{BareItemFromInput, Decimal};

use list::{ListError, Member};

/// One lock that somebody asks for: a member of an annotation, or a lock of a rule. What is not said is left to the
/// policy's defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which lock.
    pub name: LockName,
    /// In which mode.
    pub mode: Option<Mode>,
    /// The longest time to stand in its queue.
    pub wait: Option<Duration>,
    /// How long the grant outlives its last renewal.
    pub ttl: Option<Duration>,
    /// The longest total time that the grant may be renewed for.
    pub hold: Option<Duration>,
}

impl Wanted {
    /// A lock of which nothing but the name is said.
    pub fn new(name: LockName) -> Self {
        Wanted { name, mode: None, wait: None, ttl: None, hold: None }
    }
}

/// Why an annotation is refused: what is wrong, and where. Members count from 1. Printable ASCII.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// It is no structured-field List.
    #[error(transparent)]
    List(#[from] ListError),
    /// A member's name breaks a rule for lock names.
    #[error("member {member}: {error}")]
    Name {
        /// Which member.
        member: usize,
        /// The rule.
        error: NameError,
    },
    /// A `mode` that is none.
    #[error(
        "member {member}: mode {found} is not a mode; use exclusive, shared, intent-shared, intent-exclusive or \
         shared-intent-exclusive"
    )]
    Mode {
        /// Which member.
        member: usize,
        /// What was there, quoted.
        found: String,
    },
    /// A `wait`, `ttl` or `hold` that is no fit number.
    #[error("member {member}: {parameter} {problem}")]
    Number {
        /// Which member.
        member: usize,
        /// Which parameter.
        parameter: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An intent mode on a class without a hierarchy.
    #[error("{lock}: mode {mode} needs a class with a hierarchy, and {class} has none")]
    Intent {
        /// The lock.
        lock: LockName,
        /// The mode.
        mode: Mode,
        /// Its class.
        class: String,
    },
}

/// Reads `lock` fields, or the string in a route's metadata. Several fields are one List, in their order.
///
/// # Errors
/// The first thing that is wrong. A List without a member is wrong too: an annotation that names no lock is a mistake.
pub fn parse_lock_header<'a>(fields: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Wanted>, AnnotationError> {
    let text = list::join(fields);
    let members = list::parse(&text, &["mode", "wait", "ttl", "hold"])?;
    members.iter().enumerate().map(|(index, member)| wanted(index + 1, member)).collect()
}

fn wanted(number: usize, member: &Member<'_>) -> Result<Wanted, AnnotationError> {
    let name = LockName::parse(&member.value).map_err(|error| AnnotationError::Name { member: number, error })?;
    Ok(Wanted {
        name,
        mode: member.parameter("mode").map(|value| mode(number, value)).transpose()?,
        wait: seconds(number, member, "wait", true)?,
        ttl: seconds(number, member, "ttl", false)?,
        hold: seconds(number, member, "hold", false)?,
    })
}

fn mode(member: usize, value: &BareItemFromInput<'_>) -> Result<Mode, AnnotationError> {
    let text = list::text(value);
    text.as_deref().and_then(|text| text.parse().ok()).ok_or_else(|| AnnotationError::Mode {
        member,
        found: match text {
            // Tokens and Strings are printable ASCII.
            Some(text) => format!("\"{}\"", text.chars().take(40).collect::<String>()),
            None => String::from("(neither a Token nor a String)"),
        },
    })
}

fn seconds(
    number: usize,
    member: &Member<'_>,
    parameter: &'static str,
    zero_is_fit: bool,
) -> Result<Option<Duration>, AnnotationError> {
    let wrong = |problem| AnnotationError::Number { member: number, parameter, problem };
    let millis = match member.parameter(parameter) {
        None => return Ok(None),
        // At most 15 digits: times a thousand it still fits.
        Some(BareItemFromInput::Integer(seconds)) => i64::from(*seconds).saturating_mul(1000),
        Some(BareItemFromInput::Decimal(seconds)) => i64::from(Decimal::as_integer_scaled_1000(seconds)),
        Some(_) => return Err(wrong("is not a number of seconds")),
    };
    match u64::try_from(millis) {
        Err(_) => Err(wrong("cannot be negative")),
        Ok(0) if !zero_is_fit => Err(wrong("must be above 0")),
        Ok(millis) => Ok(Some(Duration::from_millis(millis))),
    }
}

/// Whether a lock of this class may be asked for in this mode: intents need a hierarchy.
pub fn mode_fits(classes: &Classes, class: &str, mode: Mode) -> bool {
    !mode.is_intent() || classes.get(class).hierarchy
}

/// Refuses modes that the class of their lock cannot have.
///
/// # Errors
/// The first lock with such a mode.
pub fn check_modes(classes: &Classes, wanted: &[Wanted]) -> Result<(), AnnotationError> {
    for ask in wanted {
        if let Some(mode) = ask.mode
            && !mode_fits(classes, ask.name.class(), mode)
        {
            let class = ask.name.class().to_owned();
            return Err(AnnotationError::Intent { lock: ask.name.clone(), mode, class });
        }
    }
    Ok(())
}

/// Makes one ask of the several that name one lock, and sorts them by name. The result is safe for each of them: the
/// mode is what they add up to (an unsaid one counts as `default_mode`), the shortest wait and the shortest hold
/// limit count, and the longest TTL.
pub fn merge(wanted: Vec<Wanted>, default_mode: Mode) -> Vec<Wanted> {
    let mut merged: BTreeMap<LockName, Wanted> = BTreeMap::new();
    for ask in wanted {
        match merged.get_mut(&ask.name) {
            None => {
                merged.insert(ask.name.clone(), ask);
            }
            Some(kept) => {
                if kept.mode != ask.mode {
                    let joined = kept.mode.unwrap_or(default_mode).join(ask.mode.unwrap_or(default_mode));
                    kept.mode = Some(joined);
                }
                kept.wait = either(kept.wait, ask.wait, Duration::min);
                kept.ttl = either(kept.ttl, ask.ttl, Duration::max);
                kept.hold = either(kept.hold, ask.hold, Duration::min);
            }
        }
    }
    merged.into_values().collect()
}

fn either(a: Option<Duration>, b: Option<Duration>, pick: fn(Duration, Duration) -> Duration) -> Option<Duration> {
    match (a, b) {
        (Some(a), Some(b)) => Some(pick(a, b)),
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod tests {
    use interlock_core::Class;

    use super::*;

    fn one(field: &str) -> Result<Vec<Wanted>, AnnotationError> {
        parse_lock_header([field.as_bytes()])
    }

    fn error(field: &str) -> String {
        one(field).unwrap_err().to_string()
    }

    fn named(name: &str) -> Wanted {
        Wanted::new(LockName::parse(name).unwrap())
    }

    #[test]
    fn the_example_of_the_contract() {
        let asks = one("order/42;wait=1.5;ttl=5, stock/7;mode=shared").unwrap();
        assert_eq!(
            asks,
            [
                Wanted {
                    wait: Some(Duration::from_millis(1500)),
                    ttl: Some(Duration::from_secs(5)),
                    ..named("order/42")
                },
                Wanted { mode: Some(Mode::Shared), ..named("stock/7") },
            ]
        );
    }

    #[test]
    fn many_fields_are_one_list() {
        let asks = parse_lock_header([&b"a/1"[..], b"\"b/@2\";hold=60, c;wait=0"]).unwrap();
        let names: Vec<_> = asks.iter().map(|ask| ask.name.as_str()).collect();
        assert_eq!(names, ["a/1", "b/@2", "c"]);
        assert_eq!(asks[1].hold, Some(Duration::from_secs(60)));
        assert_eq!(asks[2].wait, Some(Duration::ZERO));
    }

    #[test]
    fn a_string_and_a_token_name_the_same_lock() {
        assert_eq!(one("order/42").unwrap(), one("\"order/%34%32\"").unwrap());
    }

    #[test]
    fn unknown_parameters_are_ignored_and_the_last_of_a_name_counts() {
        let asks = one("a;x=?1;y=:AA==:;mode=bad;mode=\"shared\";z").unwrap();
        assert_eq!(asks, [Wanted { mode: Some(Mode::Shared), ..named("a") }]);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        assert_eq!(error(""), "it names no lock");
        assert_eq!(error("   "), "it names no lock");
        assert_eq!(error("a,"), "member 1: trailing comma at index 1");
        assert_eq!(error("a, b c"), "member 2: trailing characters after member at index 5");
        assert_eq!(error("a, ;"), "member 2: expected start of bare item at index 3");
        assert_eq!(error("a, (b c)"), "member 2: is an Inner List; it must be a Token or a String");
        assert_eq!(error("a, 42"), "member 2: is an Integer; it must be a Token or a String");
        assert_eq!(error("a//b"), "member 1: a lock name cannot have an empty segment (byte 2)");
        assert_eq!(error("\"a b\""), "member 1: byte 0x20 at 1 cannot stand in a lock name; write it as %20");
        assert_eq!(error("a;wait=-1"), "member 1: wait cannot be negative");
        assert_eq!(error("a;ttl=0"), "member 1: ttl must be above 0");
        assert_eq!(error("a;hold=0.0"), "member 1: hold must be above 0");
        assert_eq!(error("a;wait"), "member 1: wait is not a number of seconds");
        assert_eq!(error("a;wait=\"1\""), "member 1: wait is not a number of seconds");
        assert!(error("a;mode=exlusive").starts_with("member 1: mode \"exlusive\" is not a mode; use exclusive,"));
        assert!(error("a;mode=1").starts_with("member 1: mode (neither a Token nor a String) is not a mode"));
        assert_eq!(error("a;wait=1234567890123456"), "member 1: too many digits at index 22");
    }

    #[test]
    fn the_longest_number_does_not_overflow() {
        let asks = one("a;wait=999999999999999;ttl=999999999999.999").unwrap();
        assert_eq!(asks[0].wait, Some(Duration::from_secs(999_999_999_999_999)));
        assert_eq!(asks[0].ttl, Some(Duration::from_millis(999_999_999_999_999)));
    }

    #[test]
    fn no_byte_and_no_size_is_too_much() {
        for byte in 0..=255u8 {
            for field in [vec![byte], vec![b'a', byte], vec![b'a', b'/', byte, b'b'], vec![b'"', byte, b'"']] {
                if let Err(error) = parse_lock_header([field.as_slice()]) {
                    let said = error.to_string();
                    assert!(said.bytes().all(|byte| (0x20..0x7F).contains(&byte)), "{said}");
                }
            }
        }
        for byte in 0x80..=0xFFu8 {
            assert!(parse_lock_header([[b'a', byte].as_slice()]).is_err());
        }
        assert!(parse_lock_header([vec![b'a'; 60 * 1024].as_slice()]).is_err());
        assert!(parse_lock_header(["a,".repeat(30 * 1024).as_bytes()]).is_err());
        assert!(parse_lock_header(["(".repeat(60 * 1024).as_bytes()]).is_err());
        let thousand: Vec<_> = (0..1000).map(|n| format!("order/{n}")).collect();
        assert_eq!(one(&thousand.join(", ")).unwrap().len(), 1000);
    }

    #[test]
    fn intents_need_a_hierarchy() {
        let mut classes = Classes::default();
        classes.insert("stock".into(), Class { hierarchy: true, ..Class::default() });
        let asks = one("stock/1;mode=intent-shared").unwrap();
        assert_eq!(check_modes(&classes, &asks), Ok(()));
        let asks = one("stock/1;mode=shared, order/1;mode=intent-shared").unwrap();
        assert_eq!(
            check_modes(&classes, &asks).unwrap_err().to_string(),
            "order/1: mode intent-shared needs a class with a hierarchy, and order has none"
        );
    }

    #[test]
    fn asks_for_one_lock_are_merged() {
        let merged = merge(
            one("b;mode=shared;wait=3;ttl=1;hold=9, a, b;mode=intent-exclusive;wait=2;ttl=4;hold=8, b;wait=5").unwrap(),
            Mode::Shared,
        );
        assert_eq!(
            merged,
            [
                named("a"),
                Wanted {
                    name: LockName::parse("b").unwrap(),
                    mode: Some(Mode::SharedIntentExclusive),
                    wait: Some(Duration::from_secs(2)),
                    ttl: Some(Duration::from_secs(4)),
                    hold: Some(Duration::from_secs(8)),
                }
            ]
        );
        assert_eq!(merge(one("a;mode=shared, a").unwrap(), Mode::Exclusive)[0].mode, Some(Mode::Exclusive));
        assert_eq!(merge(one("a, a").unwrap(), Mode::Exclusive)[0].mode, None);
    }
}
