//! Receipts as their holders have them: sealed with the policy's keys, so that they are worth something only to who holds
//! these keys.
//!
//! A receipt is base64url of what [`Keys::seal`] makes of a version (1 byte) and the grant as postcard writes it.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use interlock_core::lease::Receipt;

use crate::policy::Keys;

const PURPOSE: &[u8] = b"interlock-receipt";
const VERSION: u8 = 1;

/// Seals a receipt. None where there is no key, since then nobody could tell it from a forged one.
pub fn seal(keys: &Keys, receipt: &Receipt) -> Option<String> {
    let payload = postcard::to_extend(receipt, vec![VERSION]).ok()?;
    keys.seal(PURPOSE, &payload).map(|sealed| URL_SAFE_NO_PAD.encode(sealed))
}

/// Opens a receipt. None where it was not sealed with one of these keys, to the last byte.
pub fn open(keys: &Keys, text: &str) -> Option<Receipt> {
    let sealed = URL_SAFE_NO_PAD.decode(text).ok()?;
    let payload = keys.open(PURPOSE, &sealed)?;
    let (version, receipt) = payload.split_first()?;
    if *version != VERSION {
        return None;
    }
    match postcard::take_from_bytes(receipt).ok()? {
        (receipt, []) => Some(receipt),
        _ => None,
    }
}
