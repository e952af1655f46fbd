//! The values that streaming options take, bounded where they are typed, so that a refusal names the option and not a
//! field of the engine. The limits themselves belong to the plan and the reader.

use crate::io::{DEPTH_MOST, REQUEST_MOST_BYTES};
use crate::plan::{SLOTS_MAX, SLOTS_MIN};
use crate::units::{HumanBytes, PAGE_2M, PAGE_4K};

/// Slots of the ring.
///
/// # Errors
/// A sentence for the user.
pub fn slots(text: &str) -> Result<u32, String> {
    within(text, SLOTS_MIN, SLOTS_MAX)
}

/// Reads in flight.
///
/// # Errors
/// A sentence for the user.
pub fn depth(text: &str) -> Result<u32, String> {
    within(text, 1, DEPTH_MOST)
}

/// Bytes of one read.
///
/// # Errors
/// A sentence for the user.
pub fn request_bytes(text: &str) -> Result<u32, String> {
    let bytes = super::size(text)?;
    if bytes.is_multiple_of(PAGE_4K) && bytes <= REQUEST_MOST_BYTES {
        return u32::try_from(bytes).map_err(|error| error.to_string());
    }
    let most = HumanBytes(REQUEST_MOST_BYTES);
    Err(format!(
        "'{text}' is no length of a read: it is a multiple of 4 KiB, at most {most}"
    ))
}

/// Page size of the windows.
///
/// # Errors
/// A sentence for the user.
pub fn page_bytes(text: &str) -> Result<u64, String> {
    match super::size(text)? {
        bytes @ (PAGE_4K | PAGE_2M) => Ok(bytes),
        _ => Err(format!(
            "'{text}' is not a page size; pages are 4KiB or 2MiB"
        )),
    }
}

/// A temperature: zero or more.
///
/// # Errors
/// A sentence for the user.
pub fn temperature(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err(format!("'{text}' is not a temperature; it is 0 or more")),
    }
}

/// A share of the probability: more than 0, at most 1.
///
/// # Errors
/// A sentence for the user.
pub fn probability(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err(format!(
            "'{text}' is not a share; it is more than 0 and at most 1"
        )),
    }
}

fn within(text: &str, least: u32, most: u32) -> Result<u32, String> {
    match text.trim().parse::<u32>() {
        Ok(value) if (least..=most).contains(&value) => Ok(value),
        _ => Err(format!("'{text}' is not one of {least} to {most}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_those_of_plan_and_reader() {
        assert_eq!(slots("3"), Ok(3));
        assert!(slots("1").is_err() && slots("65").is_err());
        assert_eq!(depth("256"), Ok(256));
        assert!(depth("0").is_err() && depth("257").is_err());
        assert_eq!(request_bytes("1GiB"), Ok(1 << 30));
        assert!(request_bytes("5").is_err() && request_bytes("2GiB").is_err());
        assert_eq!(page_bytes("2MiB"), Ok(PAGE_2M));
        assert!(page_bytes("3").is_err());
    }

    #[test]
    fn a_refusal_says_what_is_possible() {
        assert_eq!(slots("99").unwrap_err(), "'99' is not one of 2 to 64");
        let message = request_bytes("5").unwrap_err();
        assert!(message.contains("multiple of 4 KiB"), "{message}");
    }

    #[test]
    fn sampling_values_are_numbers_in_range() {
        assert_eq!(temperature("0.8"), Ok(0.8));
        for text in ["nan", "inf", "-1", "warm"] {
            assert!(temperature(text).is_err(), "{text}");
        }
        assert_eq!(probability("1"), Ok(1.0));
        for text in ["0", "2", "nan", "-0.5"] {
            assert!(probability(text).is_err(), "{text}");
        }
    }
}
