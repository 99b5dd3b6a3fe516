//! How long the caller of a request waits for it, as gRPC and Envoy say it. A wait for a lock may not outlast that.

use std::time::Duration;

/// Reads `grpc-timeout`: 1 to 8 digits and a unit (gRPC over HTTP/2, "Timeout"). Nothing for any other text.
pub fn grpc_timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.len() > 8 {
        return None;
    }
    let amount = decimal(digits)?;
    match unit {
        b'H' => Some(Duration::from_secs(amount.checked_mul(3600)?)),
        b'M' => Some(Duration::from_secs(amount.checked_mul(60)?)),
        b'S' => Some(Duration::from_secs(amount)),
        b'm' => Some(Duration::from_millis(amount)),
        b'u' => Some(Duration::from_micros(amount)),
        b'n' => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

/// Reads `x-envoy-expected-rq-timeout-ms`. Envoy writes 0 for a request without a timeout, so 0 is nothing too.
pub fn envoy_timeout_ms(value: &[u8]) -> Option<Duration> {
    decimal(value).filter(|millis| *millis > 0).map(Duration::from_millis)
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |value, byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        value.checked_mul(10)?.checked_add(digit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_units() {
        assert_eq!(grpc_timeout(b"2H"), Some(Duration::from_secs(7200)));
        assert_eq!(grpc_timeout(b"3M"), Some(Duration::from_secs(180)));
        assert_eq!(grpc_timeout(b"5S"), Some(Duration::from_secs(5)));
        assert_eq!(grpc_timeout(b"250m"), Some(Duration::from_millis(250)));
        assert_eq!(grpc_timeout(b"99999999u"), Some(Duration::from_micros(99_999_999)));
        assert_eq!(grpc_timeout(b"0n"), Some(Duration::ZERO));
        for wrong in [&b""[..], b"S", b"5", b"5s", b"-5S", b"5.0S", b"123456789S", b" 5S", b"5S ", b"\xff\xff"] {
            assert_eq!(grpc_timeout(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn envoy_millis() {
        assert_eq!(envoy_timeout_ms(b"1500"), Some(Duration::from_millis(1500)));
        assert_eq!(envoy_timeout_ms(b"18446744073709551615"), Some(Duration::from_millis(u64::MAX)));
        for wrong in [&b"0"[..], b"", b"-1", b"1.5", b"1s", b"18446744073709551616"] {
            assert_eq!(envoy_timeout_ms(wrong), None, "{wrong:?}");
        }
    }
}
