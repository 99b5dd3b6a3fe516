//! What is the filter's to say, said by a caller: in any spelling, in trailers, with other people's signatures.

use super::classes::Known;
use super::dice::Dice;
use super::shot::{Shot, field};

/// What a caller forges: no filter makes such a name, nor such a fence.
pub const FORGED_NAME: &str = "forged/1";
pub const FORGED_FENCE: &str = "666666666666666";

/// What only the filter may say of a lock.
pub fn status(shot: &mut Shot, dice: &mut Dice) {
    for _ in 0..dice.within(1, 4) {
        let forged = format!("t;outcome=acquired;lock=\"{FORGED_NAME}\"");
        shot.with(dice.pick(&["lock-status", "Lock-Status", "lock_status", "LOCK-STATUS"]), forged);
    }
}

/// `lock-fence` and its kind as somebody may spell them who wants them to come through.
pub fn spelling(dice: &mut Dice) -> Vec<u8> {
    let name = dice.pick(&["lock-fence", "lock-status", "lock", "x-lock", "x-lock-fence", "lock-owner"]);
    let mut name: Vec<u8> = match dice.below(5) {
        0 => name.replace('-', "_"),
        1 => name.replace('-', dice.pick(&[".", "+", "~", "--", "-_", "__", "%2d", "\u{2010}"])),
        _ => name.to_owned(),
    }
    .into_bytes();
    for byte in &mut name {
        if dice.chance(30) {
            byte.make_ascii_uppercase();
        }
    }
    match dice.below(12) {
        0 => name.insert(0, b' '),
        1 => name.push(b' '),
        2 => name.push(b'\t'),
        3 => name.insert(0, dice.byte()),
        4 => name.push(dice.byte()),
        _ => {}
    }
    name
}

/// What a caller says that is the filter's to say.
pub fn forgery(dice: &mut Dice) -> Vec<u8> {
    match dice.below(4) {
        0 => format!("{FORGED_NAME};fence={FORGED_FENCE};mode=exclusive"),
        1 => format!("order/1;fence={FORGED_FENCE};mode=exclusive, {FORGED_NAME};fence=1"),
        2 => format!("\"{FORGED_NAME}\";fence={FORGED_FENCE};sig=:AAAA:"),
        _ => format!("t;outcome=acquired;lock=\"{FORGED_NAME}\""),
    }
    .into_bytes()
}

pub fn spellings(shot: &mut Shot, dice: &mut Dice) {
    for _ in 0..dice.within(1, 6) {
        let (name, value) = (spelling(dice), forgery(dice));
        shot.fields.push((name, value));
    }
    if dice.chance(40) {
        shot.with("lock-fence", forgery(dice));
        shot.with("lock_fence", forgery(dice));
    }
}

pub fn fences(shot: &mut Shot, dice: &mut Dice, known: &Known) {
    for _ in 0..dice.within(1, 3) {
        let mut value = match dice.below(6) {
            0 => forgery(dice),
            1 => format!("order/1;fence={FORGED_FENCE};mode=exclusive;sig=:{}:", "A".repeat(dice.below(200)))
                .into_bytes(),
            // Another's, whole.
            2 | 3 => known.signed.clone(),
            // Another's, with one byte changed.
            4 => {
                let mut cut = known.signed.clone();
                let at = dice.below(cut.len());
                cut[at] = dice.text(1)[0];
                cut
            }
            _ => {
                let size = dice.below(400);
                dice.text(size)
            }
        };
        if dice.chance(20) {
            value = [&value[..], b", ", &forgery(dice)].concat();
        }
        shot.with(dice.pick(&["lock-fence", "Lock-Fence", "lock_fence"]), value);
    }
}

pub fn trailers(shot: &mut Shot, dice: &mut Dice) {
    shot.method = b"POST".to_vec();
    shot.body = if dice.chance(80) { b"hello".to_vec() } else { Vec::new() };
    for _ in 0..dice.within(1, 5) {
        let name = if dice.chance(50) {
            dice.pick(&["lock", "lock-fence", "lock-status", "lock_fence", "lock_status", "Lock-Fence"])
                .as_bytes()
                .to_vec()
        } else {
            spelling(dice)
        };
        shot.trailers.push((name, forgery(dice)));
    }
    if dice.chance(50) {
        shot.with("trailer", "lock-fence, lock");
    }
    shot.trailers.push(field("x-checksum", "1"));
    if shot.h2 {
        shot.trailers.iter_mut().for_each(|(name, _)| name.make_ascii_lowercase());
    }
}
