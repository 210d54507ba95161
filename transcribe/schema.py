"""The Parquet schema of transcripts and of shard metrics, one place for both.

Field by field documentation for users is in docs/output.md; a test keeps the two equal.
Names follow OpenAI's `verbose_json` where it has them. Times are seconds as floats.
"""

from __future__ import annotations

import pyarrow as pa

WORD = pa.struct(
    [
        ("word", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("probability", pa.float64()),
    ]
)

SEGMENT = pa.struct(
    [
        ("id", pa.int32()),
        ("channel", pa.int32()),
        ("speaker", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("text", pa.string()),
        ("language", pa.string()),
        ("avg_logprob", pa.float64()),
        ("compression_ratio", pa.float64()),
        ("no_speech_prob", pa.float64()),
        ("temperature", pa.float64()),
        ("flags", pa.list_(pa.string())),
        ("words", pa.list_(WORD)),
    ]
)

COVERAGE = pa.struct(
    [
        ("channel", pa.int32()),
        ("speech", pa.float64()),
        ("silence", pa.float64()),
        ("skipped", pa.float64()),
    ]
)

TRANSCRIPT = pa.schema(
    [
        # identity
        ("recording_id", pa.string()),
        ("uri", pa.string()),
        ("generation", pa.string()),
        ("size_bytes", pa.int64()),
        ("content_md5", pa.string()),
        ("duplicate_of", pa.string()),
        ("metadata", pa.string()),
        # audio
        ("container", pa.string()),
        ("codec", pa.string()),
        ("sample_rate", pa.int32()),
        ("channels", pa.int32()),
        ("duration", pa.float64()),
        ("speech_duration", pa.float64()),
        # outcome
        ("status", pa.string()),
        ("error_kind", pa.string()),
        ("error_message", pa.string()),
        ("language", pa.string()),
        ("language_probability", pa.float64()),
        ("text", pa.string()),
        ("segments", pa.list_(SEGMENT)),
        ("coverage", pa.list_(COVERAGE)),
        # provenance
        ("model", pa.string()),
        ("model_revision", pa.string()),
        ("engine", pa.string()),
        ("config_fingerprint", pa.string()),
        ("run_id", pa.string()),
        ("transcribed_at", pa.timestamp("us", tz="UTC")),
        # throughput
        ("shard_id", pa.string()),
        ("worker", pa.string()),
        ("node", pa.string()),
        ("device", pa.string()),
        ("decode_seconds", pa.float64()),
        ("recognise_seconds", pa.float64()),
    ]
)

# Columns that say when, where and how fast, but not what: two runs may differ in these.
PROVENANCE_ONLY = frozenset(
    "run_id transcribed_at shard_id worker node device decode_seconds recognise_seconds".split()
)

METRICS = pa.schema(
    [
        ("run_id", pa.string()),
        ("shard_id", pa.string()),
        ("recordings", pa.int32()),
        ("ok", pa.int32()),
        ("empty", pa.int32()),
        ("failed", pa.int32()),
        ("duplicates", pa.int32()),
        ("audio_seconds", pa.float64()),
        ("duplicate_seconds", pa.float64()),
        ("channel_seconds", pa.float64()),
        ("speech_seconds", pa.float64()),
        ("windows", pa.int32()),
        ("batch_limit", pa.int64()),
        ("batch_halvings", pa.int32()),
        ("read_seconds", pa.float64()),
        ("decode_seconds", pa.float64()),
        ("resample_seconds", pa.float64()),
        ("speech_detection_seconds", pa.float64()),
        ("recognise_seconds", pa.float64()),
        ("features_seconds", pa.float64()),
        ("encoder_seconds", pa.float64()),
        ("decoder_seconds", pa.float64()),
        ("retries_seconds", pa.float64()),
        ("assemble_seconds", pa.float64()),
        ("publish_seconds", pa.float64()),
        ("decode_queue_seconds", pa.float64()),
        ("publish_queue_seconds", pa.float64()),
        ("decode_cpu_seconds", pa.float64()),
        ("recognise_cpu_seconds", pa.float64()),
        ("heard_seconds", pa.float64()),
        ("padded_seconds", pa.float64()),
        ("tokens", pa.int64()),
        ("token_slots", pa.int64()),
        ("rtfx", pa.float64()),
        ("engine", pa.string()),
        ("device", pa.string()),
        ("node", pa.string()),
        ("worker", pa.string()),
        ("decode_peak_bytes", pa.int64()),
        ("recognise_peak_bytes", pa.int64()),
        ("started_at", pa.timestamp("us", tz="UTC")),
        ("finished_at", pa.timestamp("us", tz="UTC")),
    ]
)
