//! Durations as policies spell them: a number and a unit, `1.5s`, `250ms`.

use std::time::Duration;

/// The longest duration of a policy. Far from where arithmetic on moments could end.
pub const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// Reads a duration.
///
/// # Errors
/// What is wrong and the fix, to stand behind the quoted text.
pub fn parse(text: &str) -> Result<Duration, &'static str> {
    const NO_DURATION: &str = "is not a duration; write a number and us, ms, s, m or h, such as \"1.5s\" or \"250ms\"";
    const TOO_FINE: &str = "is finer than a microsecond; write whole microseconds, such as \"100us\"";
    const TOO_LONG: &str = "is too long; a duration is at most \"24h\"";
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or(NO_DURATION)?;
    let (number, unit) = text.split_at_checked(unit_at).ok_or(NO_DURATION)?;
    let micros_per_unit: u64 = match unit {
        "us" => 1,
        "ms" => 1000,
        "s" => 1_000_000,
        "m" => 60_000_000,
        "h" => 3_600_000_000,
        _ => return Err(NO_DURATION),
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((_, "")) => return Err(NO_DURATION),
        Some((whole, fraction)) => (whole, fraction),
        None => (number, ""),
    };
    if whole.is_empty() || fraction.contains('.') {
        return Err(NO_DURATION);
    }
    // Only digits are left, so what does not fit is too large.
    let mut micros = whole.parse::<u64>().ok().and_then(|whole| whole.checked_mul(micros_per_unit)).ok_or(TOO_LONG)?;
    let mut unit = micros_per_unit;
    for digit in fraction.bytes().map(|byte| u64::from(byte.saturating_sub(b'0'))) {
        if digit != 0 && (unit == 0 || !unit.is_multiple_of(10)) {
            return Err(TOO_FINE);
        }
        unit /= 10;
        micros = micros.checked_add(digit.saturating_mul(unit)).ok_or(TOO_LONG)?;
    }
    let duration = Duration::from_micros(micros);
    if duration > LONGEST { Err(TOO_LONG) } else { Ok(duration) }
}

/// A duration in the spelling that [`parse`] reads.
pub fn spell(duration: Duration) -> String {
    let micros = duration.as_micros();
    match micros {
        _ if micros.is_multiple_of(1_000_000) => format!("{}s", micros / 1_000_000),
        _ if micros.is_multiple_of(1000) => format!("{}ms", micros / 1000),
        _ => format!("{micros}us"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit() {
        for (text, micros) in [
            ("2s", 2_000_000),
            ("250ms", 250_000),
            ("1.5s", 1_500_000),
            ("0.000001s", 1),
            ("1m", 60_000_000),
            ("1.5m", 90_000_000),
            ("24h", 86_400_000_000),
            ("100us", 100),
            ("0s", 0),
            ("1.50000000000s", 1_500_000),
            ("007s", 7_000_000),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_micros(micros)), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused_with_the_fix() {
        for text in
            ["", "2", "s", "1.s", ".5s", "1..5s", "1.2.3s", "-1s", "+1s", "1 s", "1m30s", "2S", "1d", "1e3s", "1ü"]
        {
            assert!(parse(text).unwrap_err().starts_with("is not a duration"), "{text}");
        }
        for text in ["25h", "99999999999999999999s", "18446744073709551615h", "86400.1s"] {
            assert!(parse(text).unwrap_err().starts_with("is too long"), "{text}");
        }
        for text in ["0.5us", "1.0000001s", "1.00000001s", "0.001us"] {
            assert!(parse(text).unwrap_err().starts_with("is finer"), "{text}");
        }
    }

    #[test]
    fn spelling_round_trips() {
        for text in ["0s", "2s", "250ms", "1us", "86400s"] {
            assert_eq!(spell(parse(text).unwrap()), text);
        }
    }
}
