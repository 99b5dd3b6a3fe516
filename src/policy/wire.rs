//! The configuration as the host hands it over: JSON, or the bytes of a `google.protobuf.Struct`.
//!
//! Envoy's documentation says that a Struct is passed as JSON. Envoy 1.40 passes its protobuf encoding; Istio and
//! StringValues give JSON. What a policy says must not be decided here.

use prost::Message;
use prost_types::Struct;
use prost_types::value::Kind;
use serde_json::{Map, Number, Value};

use super::reader::PolicyError;

/// The first byte of an encoded Struct that has a field: the key of `fields`. In JSON it is a line feed.
const STRUCT: u8 = 0x0A;

/// The configuration as one JSON value. No bytes at all are an empty object.
///
/// # Errors
/// It is neither; or it nests deeper than the decoders go (about 100 levels).
pub(super) fn value(bytes: &[u8]) -> Result<Value, PolicyError> {
    if bytes.trim_ascii().is_empty() {
        return Ok(Value::Object(Map::new()));
    }
    let not_json = match serde_json::from_slice(bytes) {
        Ok(value) => return Ok(value),
        Err(error) => error,
    };
    match Struct::decode(bytes) {
        Ok(decoded) if bytes.first() == Some(&STRUCT) => Ok(object(decoded)),
        _ => Err(PolicyError::new("", format!("the policy is not JSON ({not_json}); write one JSON object"))),
    }
}

fn object(decoded: Struct) -> Value {
    Value::Object(decoded.fields.into_iter().map(|(name, value)| (name, json(value))).collect())
}

fn json(value: prost_types::Value) -> Value {
    match value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(value)) => Value::Bool(value),
        Some(Kind::NumberValue(value)) => number(value),
        Some(Kind::StringValue(text)) => Value::String(text),
        Some(Kind::StructValue(fields)) => object(fields),
        Some(Kind::ListValue(list)) => Value::Array(list.values.into_iter().map(json).collect()),
    }
}

/// A Struct holds doubles only. What was written as a whole number is told as one: 0 and not 0.0.
fn number(value: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if value.fract() == 0.0 && value.abs() <= EXACT {
        // Whole and small enough, so nothing is lost.
        return Value::from(value as i64);
    }
    // Neither infinity nor NaN can be written in JSON or YAML; as null it is refused where a number is wanted.
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn kind(kind: Kind) -> prost_types::Value {
        prost_types::Value { kind: Some(kind) }
    }

    #[test]
    fn a_struct_says_what_its_json_says() {
        let limits = Struct { fields: [("locks".to_owned(), kind(Kind::NumberValue(16.0)))].into() };
        let from = prost_types::ListValue { values: vec![kind(Kind::StringValue("traceparent".to_owned()))] };
        let fields = [
            ("limits".to_owned(), kind(Kind::StructValue(limits))),
            ("from".to_owned(), kind(Kind::ListValue(from))),
            ("yes".to_owned(), kind(Kind::BoolValue(true))),
            ("nothing".to_owned(), kind(Kind::NullValue(0))),
            ("half".to_owned(), kind(Kind::NumberValue(-0.5))),
            ("large".to_owned(), kind(Kind::NumberValue(1e19))),
            ("infinite".to_owned(), kind(Kind::NumberValue(f64::INFINITY))),
        ];
        let bytes = Struct { fields: fields.into() }.encode_to_vec();
        assert_eq!(
            value(&bytes).unwrap(),
            json!({
                "limits": { "locks": 16 }, "from": ["traceparent"], "yes": true, "nothing": null,
                "half": -0.5, "large": 1e19, "infinite": null,
            })
        );
    }

    #[test]
    fn json_may_begin_with_a_line_feed() {
        assert_eq!(value(b"\n{\"a\":1}").unwrap(), json!({ "a": 1 }));
        assert_eq!(value(b"").unwrap(), json!({}));
        assert!(value(b"\n{\"a\":").unwrap_err().to_string().contains("is not JSON"));
        assert!(value(b"\x0a\xff").unwrap_err().to_string().contains("is not JSON"));
    }

    #[test]
    fn nesting_is_bounded() {
        assert!(value("[".repeat(100_000).as_bytes()).is_err());
        let mut bytes = Vec::new();
        for _ in 0..200 {
            let inner = prost_types::ListValue {
                values: vec![prost_types::Value::decode(bytes.as_slice()).unwrap_or_default()],
            };
            bytes = kind(Kind::ListValue(inner)).encode_to_vec();
        }
        let mut field = vec![STRUCT];
        prost::encoding::encode_varint(u64::try_from(bytes.len()).unwrap() + 2, &mut field);
        field.extend_from_slice(&[0x0A, 0x00]);
        field.extend_from_slice(&bytes);
        let _bounded = value(&field);
    }
}
