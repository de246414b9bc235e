"""Pure, columnar core: sequences, triggers, pipeline. Takes `now_ms`; knows no Faust, Kafka, torch or clock."""
