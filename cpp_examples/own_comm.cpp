/*
 * A communicator of one's own over MPI, for host memory: six ranks, of which 0 to 3 train (Megatron's TP 2 PP 2) and 3
 * to 5 serve (vLLM's TP 3; rank 3 does both). Needs an MPI with MPI_THREAD_MULTIPLE, Open MPI for instance:
 *
 *     mpicxx -std=c++17 own_comm.cpp $(pkg-config --cflags --libs reshard) -pthread -o own_comm
 *     mpirun -n 6 ./own_comm
 *
 * With --lose-a-rank, rank 5 also stays away from a sync, and then stops within one; each time the others hear of it,
 * and all go on with a new communicator.
 *
 * MpiComm is the part to take over. MPI cannot take back what it was given: a posted send cannot be cancelled, nor a
 * receive that has met its message, nor a collective, while the library wants to be done with its memory when `abort`
 * has returned. So MPI is given memory of MpiComm's alone, piece by piece, and the library's is copied from and to it
 * inside calls only. Sending from and receiving into the weights themselves would spare these copies; a failed sync
 * whose messages do not end would then leave nothing but MPI_Abort(), which ends the job.
 */
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <deque>
#include <future>
#include <map>
#include <memory>
#include <mpi.h>
#include <mutex>
#include <reshard.hpp>
#include <string>
#include <thread>
#include <vector>

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

/* ------------------------------------------------------------------ the communicator */

class MpiComm {
  public:
    /*
     * Collective over `parent`, and waits for all of it, as MPI_Comm_dup() does: what is sent here meets nothing that
     * is sent there.
     */
    explicit MpiComm(MPI_Comm parent) {
        int threads = 0;
        MPI_Query_thread(&threads);
        if (threads < MPI_THREAD_MULTIPLE)
            throw std::runtime_error("MpiComm: abort may come on any thread: MPI_THREAD_MULTIPLE is needed");
        MPI_Comm_dup(parent, &comm_);
        MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
        MPI_Comm_rank(comm_, &rank_);
        MPI_Comm_size(comm_, &world_);
        for (int peer = 0; peer < world_; peer++)
            for (bool out : {true, false})
                if (peer != rank_) lanes_[{peer, out}];
        MPI_Irecv(&heard_, sizeof heard_, MPI_BYTE, MPI_ANY_SOURCE, END, comm_, &hears_);
    }
    /* Of one that has not failed. MPI_Wait() is local after MPI_Cancel(), and so is MPI_Comm_free() as MPI is built. */
    ~MpiComm() {
        MPI_Cancel(&hears_);
        MPI_Wait(&hears_, MPI_STATUS_IGNORE);
        MPI_Comm_free(&comm_);
    }
    MpiComm(const MpiComm &) = delete;

    /* The library's communicator, which owns `mpi` from here on: it goes with the last container that uses it. */
    static reshard::Comm give(std::unique_ptr<MpiComm> mpi) {
        auto ops = reshard::sized<rs_comm_ops_t>();
        ops.ctx = mpi.get();
        ops.rank = mpi->rank_;
        ops.world_size = mpi->world_;
        ops.release = [](void *ctx) { release(static_cast<MpiComm *>(ctx)); };
        ops.abort = [](void *ctx) { guarded(ctx, [](MpiComm &c) { return c.abort(); }); };
        ops.allgather = [](void *ctx, const void *send, void *recv, uint64_t bytes, uint32_t timeout_ms) {
            auto *all = static_cast<char *>(recv);
            return guarded(ctx, [=](MpiComm &c) { return c.allgather(send, all, bytes, timeout_ms); });
        };
        ops.group_begin = [](void *) -> rs_status_t { return RS_OK; };
        ops.send = [](void *ctx, const void *data, uint64_t bytes, int32_t peer, void *) {
            return guarded(ctx, [=](MpiComm &c) { return c.add(peer, true, const_cast<void *>(data), bytes); });
        };
        ops.recv = [](void *ctx, void *data, uint64_t bytes, int32_t peer, void *) {
            return guarded(ctx, [=](MpiComm &c) { return c.add(peer, false, data, bytes); });
        };
        ops.group_end = [](void *ctx) { /* that it is under way is fine */
            return guarded(ctx, [](MpiComm &c) { return std::min(c.progress(), RS_OK); });
        };
        ops.poll = [](void *ctx) { return guarded(ctx, [](MpiComm &c) { return c.progress(); }); };
        reshard::Comm comm = reshard::Comm::custom(ops);
        mpi.release();
        return comm;
    }

    /* Why it ended, on whichever rank that began; "" while it has not. The library's error has the number only. */
    std::string why() {
        std::lock_guard<std::mutex> hold(lock_);
        return end_.text;
    }

  private:
    /* Bytes that MPI is given at once: its counts are ints, and a lane keeps as much memory. */
    static constexpr uint64_t PIECE = 1 << 20;
    enum { DATA, END }; /* tags */

    struct Message {
        char *data; /* the library's, up to a failure */
        uint64_t left;
    };
    /*
     * One direction between this rank and a peer. Both ends have the same messages in the same order, and cut them
     * alike.
     */
    struct Lane {
        std::deque<Message> queue;
        std::vector<char> piece;
        int flying = 0; /* bytes of it that MPI has */
        MPI_Request request = MPI_REQUEST_NULL;
    };
    /* Sent as it is to the peers. */
    struct End {
        rs_status_t status = RS_OK;
        char text[252] = "";
    };

    MPI_Comm comm_;
    int rank_, world_;
    std::map<std::pair<int, bool>, Lane> lanes_; /* by peer and whether it goes out */
    End end_, heard_; /* why it ended; what a peer tells */
    MPI_Request hears_ = MPI_REQUEST_NULL;
    std::vector<MPI_Request> told_;
    std::mutex lock_; /* held for no longer than one look at each lane: `abort` comes beside the other functions */

    /* No exception may reach the library. */
    template <class Call> static rs_status_t guarded(void *ctx, Call call) {
        MpiComm &c = *static_cast<MpiComm *>(ctx);
        try {
            return call(c);
        } catch (const std::exception &e) {
            std::lock_guard<std::mutex> hold(c.lock_);
            return c.fail(RS_ERR_MEMORY, e.what());
        }
    }

    /* From here on no lane moves, and so nobody touches the library's memory any more. The first reason stays. */
    rs_status_t fail(rs_status_t status, const std::string &text) {
        if (end_.status == RS_OK) {
            end_.status = status;
            std::snprintf(end_.text, sizeof end_.text, "%s", text.c_str());
        }
        return end_.status;
    }

    void must(int code, const char *what, int peer) {
        char text[MPI_MAX_ERROR_STRING];
        int length = 0;
        if (code == MPI_SUCCESS) return;
        MPI_Error_string(code, text, &length);
        fail(RS_ERR_COMM, std::string(what) + ", rank " + std::to_string(peer) + ": " + std::string(text, length));
    }

    rs_status_t add(int peer, bool out, void *data, uint64_t bytes) {
        std::lock_guard<std::mutex> hold(lock_);
        lanes_.at({peer, out}).queue.push_back({static_cast<char *>(data), bytes});
        return end_.status;
    }

    /* Moves what can be moved without waiting. */
    void move(int peer, bool out, Lane &lane) {
        while (end_.status == RS_OK && !lane.queue.empty()) {
            Message &front = lane.queue.front();
            if (lane.request != MPI_REQUEST_NULL) {
                MPI_Status status;
                int done = 0, count = lane.flying;
                must(MPI_Test(&lane.request, &done, &status), out ? "MPI_Isend" : "MPI_Irecv", peer);
                if (end_.status != RS_OK || !done) return;
                if (!out) MPI_Get_count(&status, MPI_BYTE, &count);
                if (count != lane.flying) {
                    fail(RS_ERR_COMM, "a message of another length from rank " + std::to_string(peer));
                    return;
                }
                if (!out) std::memcpy(front.data, lane.piece.data(), static_cast<size_t>(count));
                front.data += count;
                front.left -= static_cast<uint64_t>(count);
            }
            if (front.left == 0) {
                lane.queue.pop_front();
                continue;
            }
            uint64_t bytes = std::min(front.left, PIECE);
            lane.flying = static_cast<int>(bytes);
            if (lane.piece.size() < bytes) lane.piece.resize(bytes);
            if (out) std::memcpy(lane.piece.data(), front.data, bytes);
            must(out ? MPI_Isend(lane.piece.data(), lane.flying, MPI_BYTE, peer, DATA, comm_, &lane.request)
                     : MPI_Irecv(lane.piece.data(), lane.flying, MPI_BYTE, peer, DATA, comm_, &lane.request),
                 out ? "MPI_Isend" : "MPI_Irecv", peer);
        }
    }

    /* What `poll` answers. A rank that has all it waits for does not ask whether another one has given up since. */
    rs_status_t progress() {
        std::lock_guard<std::mutex> hold(lock_);
        bool left = false;
        for (auto &[key, lane] : lanes_) {
            move(key.first, key.second, lane);
            left |= !lane.queue.empty();
        }
        if (end_.status != RS_OK || !left) return end_.status;
        int told = 0;
        must(MPI_Test(&hears_, &told, MPI_STATUS_IGNORE), "MPI_Irecv", rank_);
        if (told) fail(heard_.status, heard_.text);
        return end_.status != RS_OK ? end_.status : RS_IN_PROGRESS;
    }

    /*
     * Messages, not MPI_Iallgather(): these can be given up one by one, and tell who is missing. With thousands of
     * ranks its fewer steps are worth more than the name; MPI then keeps its buffers, which are to be memory of this
     * class, after a failure as here.
     */
    rs_status_t allgather(const void *send, char *recv, uint64_t bytes, uint32_t timeout_ms) {
        using std::chrono::microseconds;
        const auto end = Clock::now() + milliseconds(timeout_ms);
        for (auto &[key, lane] : lanes_) {
            auto [peer, out] = key;
            add(peer, out, out ? const_cast<void *>(send) : recv + static_cast<uint64_t>(peer) * bytes, bytes);
        }
        std::memcpy(recv + static_cast<uint64_t>(rank_) * bytes, send, bytes);
        for (microseconds pause(10);; pause = std::min(pause * 2, microseconds(1000))) {
            rs_status_t status = progress();
            if (status != RS_IN_PROGRESS) return status;
            if (Clock::now() >= end) {
                std::lock_guard<std::mutex> hold(lock_);
                return fail(RS_ERR_TIMEOUT, "waited " + std::to_string(timeout_ms) + " ms for" + missing());
            }
            std::this_thread::sleep_for(pause);
        }
    }

    /*
     * The ranks of which something is expected; where there are none, those that have not taken what was sent to them.
     */
    std::string missing() const {
        std::string from, to;
        for (auto &[key, lane] : lanes_)
            if (!lane.queue.empty()) (key.second ? to : from) += " rank " + std::to_string(key.first);
        return from.empty() ? to : from;
    }

    /* Tells the peers, and waits for none: calls in progress end at their next look. */
    rs_status_t abort() {
        std::lock_guard<std::mutex> hold(lock_);
        fail(RS_ERR_ABORTED, "rank " + std::to_string(rank_) + " gave up, waiting for" + missing());
        told_.assign(world_, MPI_REQUEST_NULL);
        for (int peer = 0; peer < world_; peer++)
            if (peer != rank_) MPI_Isend(&end_, sizeof end_, MPI_BYTE, peer, END, comm_, &told_.at(peer));
        return end_.status;
    }

    /*
     * A failed one stays where it is, some megabytes: MPI may use its pieces until the process ends, and what is still
     * under way to this MPI_Comm must not find another one in its place.
     */
    static void release(MpiComm *c) {
        if (c->end_.status == RS_OK) delete c;
    }
};

/* ------------------------------------------------------------------ the model on either side */

constexpr int64_t LAYERS = 4, HIDDEN = 384, HEADS = 12, GROUPS = 6, DIM = HIDDEN / HEADS, INNER = 768, VOCAB = 192;
constexpr int RANKS = 6, TRAIN_TP = 2, STAGES = 2, SERVE_TP = 3, FIRST_SERVER = 3, LOST = 5;

static const char *const spec = R"({
  "model": {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "hidden_size": 384, "num_hidden_layers": 4,
            "num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 768, "vocab_size": 192},
  "source": {"framework": "megatron", "ranks": "0-3", "tensor_model_parallel_size": 2,
             "pipeline_model_parallel_size": 2, "make_vocab_size_divisible_by": 8},
  "target": {"framework": "vllm", "ranks": "3-5", "tensor_parallel_size": 3}})";

/* Rows of a tensor of the checkpoint, one below the other in a parameter. */
struct Rows {
    std::string tensor;
    int64_t first, count;
};
/* A parameter of a rank: its name, shape and memory, and what its rows are, from a column of these tensors on. */
struct Param {
    std::string name;
    std::vector<Rows> rows;
    int64_t first_column, columns;
    uint32_t role;
    bool flat; /* of one axis */
    std::vector<float> memory;
};

/* Part number `part` of `parts` equal ones of a tensor's rows. */
static Rows cut(const std::string &tensor, int64_t rows, int part, int parts) {
    return {tensor, rows / parts * part, rows / parts};
}

/* What one rank of a side has: the tensors of some layers, one shard of `parts` of each. */
static std::vector<Param> side(bool train, int part, int parts, int64_t first_layer, int64_t layers, bool first,
                               bool last) {
    std::vector<Param> out;
    auto add = [&](const std::string &name, const std::vector<Rows> &rows, int64_t column, int64_t columns,
                   bool flat = false) {
        int64_t count = 0;
        for (const Rows &r : rows) count += r.count;
        out.push_back({name, rows, column, columns, uint32_t(train ? RS_SOURCE : RS_TARGET), flat, {}});
        out.back().memory.resize(static_cast<size_t>(count * columns));
    };
    if (first)
        add(train ? "embedding.word_embeddings.weight" : "model.embed_tokens.weight",
            {cut("model.embed_tokens", VOCAB, part, parts)}, 0, HIDDEN);
    for (int64_t i = 0; i < layers; i++) {
        const std::string from = "model.layers." + std::to_string(first_layer + i) + ".";
        const std::string to = train ? "decoder.layers." + std::to_string(i) + "." : from;
        const std::string attention = from + "self_attn.";
        std::vector<Rows> qkv;
        if (train) { /* a group's queries, its key, its value, then the next group */
            for (int64_t g = GROUPS / parts * part; g < GROUPS / parts * (part + 1); g++)
                qkv.insert(qkv.end(), {{attention + "q", g * HEADS / GROUPS * DIM, HEADS / GROUPS * DIM},
                                       {attention + "k", g * DIM, DIM}, {attention + "v", g * DIM, DIM}});
        } else { /* all queries, all keys, all values */
            qkv = {cut(attention + "q", HIDDEN, part, parts), cut(attention + "k", GROUPS * DIM, part, parts),
                   cut(attention + "v", GROUPS * DIM, part, parts)};
        }
        const int64_t heads = HIDDEN / parts, inner = INNER / parts;
        add(to + (train ? "self_attention.linear_qkv.layer_norm_weight" : "input_layernorm.weight"),
            {{from + "input_layernorm", 0, 1}}, 0, HIDDEN, true);
        add(to + (train ? "self_attention.linear_qkv.weight" : "self_attn.qkv_proj.weight"), qkv, 0, HIDDEN);
        add(to + (train ? "self_attention.linear_proj.weight" : "self_attn.o_proj.weight"),
            {{attention + "o", 0, HIDDEN}}, heads * part, heads);
        add(to + (train ? "mlp.linear_fc1.layer_norm_weight" : "post_attention_layernorm.weight"),
            {{from + "post_attention_layernorm", 0, 1}}, 0, HIDDEN, true);
        add(to + (train ? "mlp.linear_fc1.weight" : "mlp.gate_up_proj.weight"),
            {cut(from + "gate", INNER, part, parts), cut(from + "up", INNER, part, parts)}, 0, HIDDEN);
        add(to + (train ? "mlp.linear_fc2.weight" : "mlp.down_proj.weight"), {{from + "down", 0, HIDDEN}},
            inner * part, inner);
    }
    if (last) {
        add(train ? "decoder.final_layernorm.weight" : "model.norm.weight", {{"model.norm", 0, 1}}, 0, HIDDEN, true);
        add(train ? "output_layer.weight" : "lm_head.weight", {cut("lm_head", VOCAB, part, parts)}, 0, HIDDEN);
    }
    return out;
}

/* The number of a tensor's first element, all tensors of the checkpoint in a row, and its columns. */
static std::pair<int64_t, int64_t> place(const std::string &tensor) {
    static const auto places = [] {
        std::map<std::string, std::pair<int64_t, int64_t>> all;
        int64_t next = 0;
        auto add = [&](const std::string &name, int64_t rows, int64_t columns) {
            all[name] = {next, columns};
            next += rows * columns;
        };
        for (const char *name : {"model.embed_tokens", "lm_head"}) add(name, VOCAB, HIDDEN);
        for (int64_t i = 0; i < LAYERS; i++) {
            const std::string layer = "model.layers." + std::to_string(i) + ".";
            for (const char *name : {"input_layernorm", "post_attention_layernorm"}) add(layer + name, 1, HIDDEN);
            for (const char *name : {"self_attn.q", "self_attn.o"}) add(layer + name, HIDDEN, HIDDEN);
            for (const char *name : {"self_attn.k", "self_attn.v"}) add(layer + name, GROUPS * DIM, HIDDEN);
            for (const char *name : {"gate", "up"}) add(layer + name, INNER, HIDDEN);
            add(layer + "down", HIDDEN, INNER);
        }
        add("model.norm", 1, HIDDEN);
        return all;
    }();
    return places.at(tensor);
}

/*
 * Calls `what` with each element of a parameter and what it must be: no two of a version are alike, and all are whole
 * numbers below 2^24.
 */
template <class What> static void each(Param &param, uint64_t version, What what) {
    float *at = param.memory.data();
    for (const Rows &rows : param.rows) {
        const auto [base, columns] = place(rows.tensor);
        for (int64_t row = rows.first; row < rows.first + rows.count; row++)
            for (int64_t i = 0; i < param.columns; i++) {
                const int64_t number = base + row * columns + param.first_column + i;
                what(*at++, static_cast<float>((number + static_cast<int64_t>(version) * 5000011) % (1 << 24)));
            }
    }
}

/* ------------------------------------------------------------------ a rank */

class Rank {
  public:
    explicit Rank(int rank) : rank_(rank) {
        if (rank < TRAIN_TP * STAGES) {
            const int stage = rank / TRAIN_TP, layers = LAYERS / STAGES;
            params_ = side(true, rank % TRAIN_TP, TRAIN_TP, stage * layers, layers, stage == 0, stage == STAGES - 1);
        }
        if (rank >= FIRST_SERVER)
            for (Param &p : side(false, rank - FIRST_SERVER, SERVE_TP, 0, LAYERS, true, true))
                params_.push_back(std::move(p));
        reshard::Preset preset(spec, rank);
        for (Param &p : params_) {
            const int64_t rows = static_cast<int64_t>(p.memory.size()) / p.columns;
            preset.bind(p.name.c_str(), p.memory.data(), p.memory.size() * sizeof(float), reshard::f32,
                        p.flat ? reshard::Dims{p.columns} : reshard::Dims{rows, p.columns}, p.role);
        }
        auto config = reshard::sized<rs_config_t>();
        config.abi = RS_ABI;
        config.staging_bytes = 32 << 20; /* little, so that there are several rounds */
        weights_ = reshard::Container(config, preset);
        connect();
    }

    /* The first communicator, and another one after a failure. */
    void connect() {
        auto mpi = std::make_unique<MpiComm>(MPI_COMM_WORLD);
        mpi_ = mpi.get();
        weights_.set_comm(MpiComm::give(std::move(mpi)));
        weights_.connect();
    }

    /* A training step, a sync, and a look at every element that it must have written. */
    void sync(uint64_t version) {
        for (Param &p : params_) each(p, version, [&](float &x, float must) { x = p.role == RS_SOURCE ? must : -1; });
        weights_.sync(version);
        long wrong = 0;
        for (Param &p : params_) each(p, version, [&](float x, float must) { wrong += x != must; });
        if (wrong > 0) throw std::runtime_error(std::to_string(wrong) + " wrong elements");
    }

    /* A sync that must fail like this, soon, and with this reason. */
    void fails(rs_sync_t request, rs_status_t like, const char *reason, milliseconds soon) {
        const auto begun = Clock::now();
        const rs_status_t status = rs_sync_weights(weights_.get(), &request);
        const std::string found = std::string(rs_status_name(status)) + ", " + mpi_->why();
        const auto took = std::chrono::duration_cast<milliseconds>(Clock::now() - begun);
        std::printf("rank %d, after %d ms: %s\n", rank_, static_cast<int>(took.count()), found.c_str());
        if (status != like || found.find(reason) == std::string::npos || took > soon)
            throw std::runtime_error("not as it should fail");
    }

    void lose_a_rank(uint64_t version) {
        auto request = reshard::sized<rs_sync_t>();
        request.version = version;
        request.timeout_ms = 3000;
        if (rank_ == LOST) /* as if stopped: it neither calls the library nor MPI */
            std::this_thread::sleep_for(milliseconds(6000));
        else
            fails(request, RS_ERR_TIMEOUT, "ms for rank 5", milliseconds(5500));
        MPI_Barrier(MPI_COMM_WORLD); /* the job's own way to agree that it goes on */
        connect();
        sync(version);

        /* In the middle of a sync; a thread of rank 0 loses patience long before the deadline. */
        request.version = version + 1;
        request.timeout_ms = 60000;
        if (rank_ == LOST)
            request.progress = [](void *, uint64_t, uint64_t) { std::this_thread::sleep_for(milliseconds(3000)); };
        const auto impatient = std::async(std::launch::async, [&] { /* waited for in any case */
            std::this_thread::sleep_for(milliseconds(1000));
            if (rank_ == 0) weights_.abort();
        });
        fails(request, RS_ERR_ABORTED, "rank 0 gave up", milliseconds(10000));
        impatient.wait();
        MPI_Barrier(MPI_COMM_WORLD);
        connect();
        sync(version + 1);
    }

  private:
    int rank_;
    std::vector<Param> params_;
    reshard::Container weights_;
    MpiComm *mpi_ = nullptr; /* the library's, until it is given another one */
};

int main(int argc, char **argv) {
    int threads = 0, rank = 0, ranks = 0;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &threads);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    const bool lose = argc > 1 && std::strcmp(argv[1], "--lose-a-rank") == 0;
    try {
        if (ranks != RANKS) throw std::runtime_error("mpirun -n 6 is needed");
        Rank it(rank);
        for (uint64_t version = 1; version <= 3; version++) it.sync(version);
        if (lose) it.lose_a_rank(4);
    } catch (const std::exception &error) {
        std::fprintf(stderr, "own_comm: rank %d: %s\n", rank, error.what());
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    MPI_Barrier(MPI_COMM_WORLD);
    if (rank == 0) std::puts("three versions are where they belong");
    if (rank == 0 && lose) std::puts("rank 5 was lost twice: all knew, and two more versions are where they belong");
    MPI_Finalize();
}
