//! A share of all owners, and which owners are in it. What is done with those in it must not live here.

use std::hash::Hasher as _;

use interlock_core::OwnerId;
use siphasher::sip::SipHasher13;

/// Hundredths of a percent in the whole.
const WHOLE: u16 = 10_000;

/// A share of all owners, above none and below all, in steps of 0.01 %.
///
/// Who is in is decided by the owner's name alone, with a hash that has no secret: alike on every proxy and worker, before
/// and after a restart. An owner that is in a share is in every larger one, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share(u16);

/// How much a percentage is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Percentage {
    None,
    Some(Share),
    All,
}

impl Share {
    /// Whether an owner is in it: whether the SipHash-1-3 of its name, under a key of 16 zero bytes, modulo 10,000 is below
    /// the share's hundredths of a percent.
    pub fn has(self, owner: &OwnerId) -> bool {
        let mut hash = SipHasher13::new();
        hash.write(owner.as_str().as_bytes());
        hash.finish() % u64::from(WHOLE) < u64::from(self.0)
    }
}

/// Reads a percentage: `10%`, `0.5%`.
///
/// # Errors
/// What is wrong and the fix, to stand behind the quoted text.
pub(super) fn parse(text: &str) -> Result<Percentage, &'static str> {
    const NO_PERCENTAGE: &str = "is not a percentage; write a number and %, such as \"10%\" or \"0.5%\"";
    const TOO_FINE: &str = "is finer than a hundredth of a percent; write two decimals at most";
    const TOO_LARGE: &str = "is more than all owners; a percentage is at most \"100%\"";
    let number = text.strip_suffix('%').ok_or(NO_PERCENTAGE)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return Err(NO_PERCENTAGE);
    }
    let fraction = fraction.trim_end_matches('0');
    let hundredths = match fraction.len() {
        0 => Ok(0),
        1 => fraction.parse::<u16>().map(|tenths| tenths * 10),
        2 => fraction.parse(),
        _ => return Err(TOO_FINE),
    };
    // Only digits are left, so what does not fit is too large.
    let whole = whole.parse::<u16>().ok().and_then(|whole| whole.checked_mul(100)).ok_or(TOO_LARGE)?;
    match whole.checked_add(hundredths.map_err(|_| NO_PERCENTAGE)?).ok_or(TOO_LARGE)? {
        0 => Ok(Percentage::None),
        WHOLE => Ok(Percentage::All),
        some if some < WHOLE => Ok(Percentage::Some(Share(some))),
        _ => Err(TOO_LARGE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(text: &str) -> Share {
        match parse(text) {
            Ok(Percentage::Some(share)) => share,
            other => panic!("{text}: {other:?}"),
        }
    }

    fn owner(name: &str) -> OwnerId {
        OwnerId::new(name).unwrap()
    }

    #[test]
    fn percentages_are_read_to_the_hundredth() {
        for (text, hundredths) in
            [("10%", 1000), ("0.5%", 50), ("0.01%", 1), ("99.99%", 9999), ("1.50%", 150), ("07.2000%", 720)]
        {
            assert_eq!(share(text), Share(hundredths), "{text}");
        }
        for (text, whole) in [("0%", Percentage::None), ("0.00%", Percentage::None), ("100.0%", Percentage::All)] {
            assert_eq!(parse(text), Ok(whole), "{text}");
        }
        for (text, problem) in [
            ("10", "is not a percentage"),
            ("", "is not a percentage"),
            ("%", "is not a percentage"),
            (".5%", "is not a percentage"),
            ("5.%", "is not a percentage"),
            ("1.2.3%", "is not a percentage"),
            ("-1%", "is not a percentage"),
            ("+1%", "is not a percentage"),
            ("10 %", "is not a percentage"),
            ("1e1%", "is not a percentage"),
            ("0.001%", "is finer"),
            ("100.01%", "is more than all"),
            ("101%", "is more than all"),
            ("656%", "is more than all"),
            ("99999999999999999999%", "is more than all"),
        ] {
            let found = parse(text).unwrap_err();
            assert!(found.starts_with(problem), "{text}: {found}");
        }
    }

    /// Pinned: another hash would move owners from one side to the other in the middle of a rollout, and proxies of two
    /// versions would decide differently about one transaction.
    #[test]
    fn an_owners_place_is_the_same_for_ever() {
        // The lowest percentage that an owner is in.
        let place = |name: &str| (1..WHOLE).find(|some| Share(*some).has(&owner(name)));
        let places = [
            "4bf92f3577b34da6a3ce929d0e0e4736",
            "00000000000000000000000000000001",
            "6f5cada7-3d84-41ae-951f-badf9010ddab",
            "nightly-report",
            "a",
        ]
        .map(place);
        assert_eq!(places, [Some(8082), Some(2768), Some(2236), Some(5647), Some(8020)]);
    }

    #[test]
    fn a_share_has_its_part_of_the_owners_and_a_larger_one_has_them_too() {
        let owners: Vec<OwnerId> =
            (0..100_000u128).map(|n| owner(&format!("{:032x}", n.wrapping_mul(0x9e37)))).collect();
        let mut before = vec![false; owners.len()];
        for percent in ["0.1%", "1%", "10%", "20%", "50%", "90%", "99.9%"] {
            let share = share(percent);
            let now: Vec<bool> = owners.iter().map(|owner| share.has(owner)).collect();
            assert!(before.iter().zip(&now).all(|(before, now)| !before || *now), "{percent}: an owner has left");
            let count = now.iter().filter(|is_in| **is_in).count() as f64;
            let expected = f64::from(share.0) / f64::from(WHOLE) * owners.len() as f64;
            // Six standard deviations of as many throws of a coin.
            let most = 6.0 * (expected * (1.0 - f64::from(share.0) / f64::from(WHOLE))).sqrt();
            assert!((count - expected).abs() < most, "{percent}: {count} of {}", owners.len());
            before = now;
        }
    }
}
