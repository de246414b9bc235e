import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonToken;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.time.Duration;
import java.util.Properties;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Grouped;
import org.apache.kafka.streams.kstream.KGroupedStream;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.kstream.TimeWindows;
import org.apache.kafka.streams.state.WindowStore;

/**
 * Kafka Streams with windowed aggregates: count and sum of durations per user, in tiles of 5 minutes and of an hour. A
 * tile is a tumbling window, kept for as long as the feature's own window (an hour and a day); a reader adds up the
 * tiles of the store. Hopping windows would hold that sum ready, at 12 and 24 updates per event instead of one. Written
 * for speed: JSON is read without a tree, the user stays in bytes, an aggregate is 16 bytes, and the record cache holds
 * every user. Nothing is sent downstream. Environment: BROKER, GROUP, TOPIC, FOLDER.
 */
public final class KafkaStreamsWindows {
    private static final JsonFactory JSON = new JsonFactory();
    private static final long CACHE_BYTES = 256L << 20;

    /** Fields of an action. */
    private record Action(long timeMs, long durationMs) {}

    private static Action read(String topic, byte[] value) {
        if (value == null) {
            return null;
        }
        long timeMs = 0;
        long durationMs = 0;
        try (JsonParser parser = JSON.createParser(value)) {
            parser.nextToken();
            while (parser.nextToken() == JsonToken.FIELD_NAME) {
                String field = parser.currentName();
                parser.nextToken();
                if (field.equals("timestamp_ms")) {
                    timeMs = parser.getLongValue();
                } else if (field.equals("duration_ms")) {
                    durationMs = parser.getLongValue();
                } else {
                    parser.skipChildren();
                }
            }
        } catch (IOException error) {
            throw new IllegalStateException(error);
        }
        return new Action(timeMs, durationMs);
    }

    private static byte[] write(String topic, Action action) {
        throw new IllegalStateException("actions are only read");
    }

    /** The count, then the sum, 8 bytes each. */
    private static byte[] with(byte[] aggregate, Action action) {
        ByteBuffer before = ByteBuffer.wrap(aggregate);
        ByteBuffer next = ByteBuffer.allocate(16);
        next.putLong(before.getLong() + 1).putLong(before.getLong() + action.durationMs());
        return next.array();
    }

    private static void aggregate(KGroupedStream<byte[], Action> users, Duration tile, Duration window) {
        users.windowedBy(TimeWindows.ofSizeAndGrace(tile, window))
                .aggregate(() -> new byte[16], (user, action, aggregate) -> with(aggregate, action),
                        Materialized.<byte[], byte[], WindowStore<Bytes, byte[]>>as("tiles-" + tile.toMinutes())
                                .withKeySerde(Serdes.ByteArray()).withValueSerde(Serdes.ByteArray())
                                .withRetention(tile.plus(window)).withCachingEnabled());
    }

    public static void main(String[] arguments) {
        Serde<Action> actions = Serdes.serdeFrom(KafkaStreamsWindows::write, KafkaStreamsWindows::read);
        StreamsBuilder builder = new StreamsBuilder();
        KGroupedStream<byte[], Action> users = builder
                .stream(System.getenv("TOPIC"), Consumed.with(Serdes.ByteArray(), actions)
                        .withTimestampExtractor((record, before) -> ((Action) record.value()).timeMs()))
                .groupByKey(Grouped.with(Serdes.ByteArray(), actions));
        aggregate(users, Duration.ofMinutes(5), Duration.ofHours(1));
        aggregate(users, Duration.ofHours(1), Duration.ofDays(1));

        Properties properties = new Properties();
        properties.put(StreamsConfig.APPLICATION_ID_CONFIG, System.getenv("GROUP"));
        properties.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, System.getenv("BROKER"));
        properties.put(StreamsConfig.STATE_DIR_CONFIG, System.getenv("FOLDER"));
        properties.put(StreamsConfig.COMMIT_INTERVAL_MS_CONFIG, 1000);
        properties.put(StreamsConfig.STATESTORE_CACHE_MAX_BYTES_CONFIG, CACHE_BYTES);
        properties.put(ConsumerConfig.AUTO_OFFSET_RESET_CONFIG, "earliest");
        KafkaStreams streams = new KafkaStreams(builder.build(), properties);
        Runtime.getRuntime().addShutdownHook(new Thread(streams::close));
        streams.start();
    }
}
