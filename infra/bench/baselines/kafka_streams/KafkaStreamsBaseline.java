import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.Properties;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.common.utils.Utils;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Grouped;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.kstream.Produced;
import org.apache.kafka.streams.state.KeyValueStore;

/**
 * Kafka Streams in the style of its documentation: an aggregate over a grouped stream, its store in RocksDB with a
 * changelog, record cache on. A kept action is 16 bytes. Environment: BROKER, GROUP, TOPIC, OUTPUT, FOLDER, EVERY_N,
 * KEPT.
 */
public final class KafkaStreamsBaseline {
    private static final ObjectMapper MAPPER = new ObjectMapper();
    private static final int KEPT = Integer.parseInt(System.getenv("KEPT"));
    private static final long EVERY_N = Long.parseLong(System.getenv("EVERY_N"));
    private static final int HEADER_BYTES = 8;
    private static final int ACTION_BYTES = 16;

    /** The count (8 bytes), then the kept actions, oldest first: item (4), action type (4), event time (8). */
    private static byte[] with(byte[] sequence, JsonNode event) {
        int kept = (sequence.length - HEADER_BYTES) / ACTION_BYTES;
        int dropped = kept == KEPT ? 1 : 0;
        int bytes = (kept - dropped) * ACTION_BYTES;
        ByteBuffer next = ByteBuffer.allocate(HEADER_BYTES + bytes + ACTION_BYTES);
        next.putLong(count(sequence) + 1);
        next.put(sequence, HEADER_BYTES + dropped * ACTION_BYTES, bytes);
        next.putInt(hash(event.get("item_id"))).putInt(hash(event.get("action")));
        next.putLong(event.get("timestamp_ms").longValue());
        return next.array();
    }

    private static int hash(JsonNode text) {
        return Utils.murmur2(text.textValue().getBytes(StandardCharsets.UTF_8));
    }

    private static long count(byte[] sequence) {
        return ByteBuffer.wrap(sequence).getLong();
    }

    private static JsonNode read(String topic, byte[] value) {
        try {
            return value == null ? null : MAPPER.readTree(value);
        } catch (IOException error) {
            throw new IllegalStateException(error);
        }
    }

    private static byte[] write(String topic, JsonNode value) {
        return value == null ? null : value.toString().getBytes(StandardCharsets.UTF_8);
    }

    public static void main(String[] arguments) {
        Serde<JsonNode> json = Serdes.serdeFrom(KafkaStreamsBaseline::write, KafkaStreamsBaseline::read);
        StreamsBuilder builder = new StreamsBuilder();
        builder.stream(System.getenv("TOPIC"), Consumed.with(Serdes.String(), json))
                .groupByKey(Grouped.with(Serdes.String(), json))
                .aggregate(() -> new byte[HEADER_BYTES], (user, event, sequence) -> with(sequence, event),
                        Materialized.<String, byte[], KeyValueStore<Bytes, byte[]>>as("sequences")
                                .withKeySerde(Serdes.String()).withValueSerde(Serdes.ByteArray()))
                .toStream()
                .mapValues(KafkaStreamsBaseline::count)
                .filter((user, count) -> count % EVERY_N == 0)
                .to(System.getenv("OUTPUT"), Produced.with(Serdes.String(), Serdes.Long()));

        Properties properties = new Properties();
        properties.put(StreamsConfig.APPLICATION_ID_CONFIG, System.getenv("GROUP"));
        properties.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, System.getenv("BROKER"));
        properties.put(StreamsConfig.STATE_DIR_CONFIG, System.getenv("FOLDER"));
        properties.put(StreamsConfig.COMMIT_INTERVAL_MS_CONFIG, 1000);
        properties.put(ConsumerConfig.AUTO_OFFSET_RESET_CONFIG, "earliest");
        KafkaStreams streams = new KafkaStreams(builder.build(), properties);
        Runtime.getRuntime().addShutdownHook(new Thread(streams::close));
        streams.start();
    }
}
