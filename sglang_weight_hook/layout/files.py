"""Names of the files in the output directory, per slot (``{}`` is the slot's name)."""

from __future__ import annotations

# The legacy format's four names first.
DOCUMENTS = (
    "weights_meta_{}.json",
    "total_weight_meta_{}.json",
    "weight_update_summary_{}.json",
    "merged_weights_meta_{}.json",
    "weight_layout_{}.json",
    "weight_state_{}.json",
)
LEGACY = DOCUMENTS[:4]
WEIGHTS_META, TOTAL_META, SUMMARY, MERGED, LAYOUT, STATE = DOCUMENTS
SAVING_LOCK = "weight_saving_{}.lock"
OWNER_LOCK = "weight_owner_{}.lock"
HEADER = "weight_header_{}.bin"
TRANSPORT = "weight_transport_{}.json"  # only where a transfer engine runs in the server
EVENTS = "weight_events_{}.jsonl"  # appended; survives its owner
EVENTS_BEFORE = "weight_events_{}.1.jsonl"  # what was there when the file above grew too long
# Of a process, not of a slot: ``{}`` is its pid.
CONTROL = "weight_hook_{}.sock"
