// Everything of reshard.hpp, once: two ranks of a process, one with the weights, one that wants them transposed.
#include <reshard.hpp>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>

using reshard::Comm;
using reshard::Container;
using reshard::Layout;
using reshard::Mem;
using reshard::Preset;

static_assert(!std::is_copy_constructible_v<Container> && std::is_nothrow_move_constructible_v<Container>);
static_assert(!std::is_copy_constructible_v<Comm> && std::is_nothrow_move_assignable_v<Comm>);
static_assert(!std::is_copy_constructible_v<Layout> && std::is_move_constructible_v<Layout>);
static_assert(!std::is_copy_constructible_v<Preset> && std::is_nothrow_move_constructible_v<Preset>);
static_assert(sizeof(Container) == sizeof(void *) && sizeof(Comm) == sizeof(void *) && sizeof(Preset) == sizeof(void *),
              "handles cost nothing");

#define EXPECT(x) \
    do { \
        if (!(x)) { \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x); \
            std::abort(); \
        } \
    } while (0)

/// The status of the Error that `call` throws.
template <class Call> static rs_status_t status_of(Call call) {
    try {
        call();
    } catch (const reshard::Error &error) {
        EXPECT(std::string(error.what()).rfind(rs_status_name(error.status()), 0) == 0);
        EXPECT(error.is_fatal() == (error.status() <= -40));
        return error.status();
    }
    return RS_OK;
}

static Layout source(float *memory) {
    Layout layout;
    auto tensor = layout.tensor("model.w", {2, 3});
    auto buffer = layout.buffer("a name that is too long to be kept inside a string", memory, 24, reshard::f32, {2, 3}, RS_SOURCE);
    layout.tile(tensor, buffer);
    return layout;
}

static Layout target(float *memory) {
    Layout layout;
    auto tensor = layout.tensor("model.w", {2, 3});
    auto buffer = layout.buffer("served", memory, 28, reshard::f32, {7}, RS_TARGET);
    layout.row(buffer).flags = RS_BUFFER_PADDED;
    layout.tile(tensor, buffer, 4, {0, 0}, {2, 2}, {1, 2});                // columns 0 and 1, from element 1 on
    layout.tile(tensor, buffer, 20, {6}, {2}, {1}, {1});                   // element 2, seen as one row of 6
    layout.tile(tensor, buffer, 24, {6}, {5}, {1}, {1});                   // element 5
    return layout;
}

static void rank(int32_t me) {
    std::array<float, 6> weights{1, 2, 3, 4, 5, 6};
    Mem served = me == 0 ? Mem(28) : Mem(28, 0);
    float *memory = static_cast<float *>(served.data());
    memory[0] = -1;

    Layout layout = me == 0 ? source(weights.data()) : target(memory);
    Layout moved = std::move(layout);
    Container container;
    {
        Comm comm = Comm::loopback(77, me, 2);
        auto config = reshard::config(comm);
        config.name = "c++";
        container = Container(config, moved);
    }
    EXPECT(status_of([&] { container.sync(1); }) == RS_ERR_STATE);
    container.connect();
    EXPECT(container.sync(1) && container.poll());
    if (me == 1) {
        const std::array<float, 7> expected{-1, 1, 4, 2, 5, 3, 6};
        for (std::size_t i = 0; i < 7; i++) EXPECT(memory[i] == expected[i]);
        rs_param_t param = container.param("served");
        EXPECT(param.data == memory && param.version == 1 && param.state == RS_PARAM_SYNCED);
        EXPECT(container.param_at(0).data == memory);
        EXPECT(status_of([&] { container.param_at(1); }) == RS_ERR_NOT_FOUND);
    }
    EXPECT(container.describe(RS_DESCRIBE_STATS).find("\"version\":1") != std::string::npos);
    EXPECT(container.describe(RS_DESCRIBE_PLAN).back() == '}');
    EXPECT(!container.exported().empty());
    EXPECT(status_of([&] { container.import_tables("nonsense"); }) == RS_ERR_INVALID);
    container.rebind(moved);
    EXPECT(container.sync(2));

    container.abort();
    EXPECT(status_of([&] { container.sync(3); }) == RS_ERR_ABORTED);
    Comm next = Comm::loopback(78, me, 2);
    container.set_comm(next);
    container.connect();
    EXPECT(container.sync(3));
    Container other(container.release());
    EXPECT(container.get() == nullptr && other.poll());
}

/// A model of one layer that its trainer and its engine both hold on the one rank there is.
static void preset() {
    static const struct {
        const char *trained, *served; // one parameter of Megatron's, one of vLLM's
        reshard::Dims shape;
    } params[] = {
        {"module.embedding.word_embeddings.weight", "model.embed_tokens.weight", {64, 4}},
        {"decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", "model.layers.0.input_layernorm.weight", {4}},
        {"decoder.layers.0.self_attention.linear_qkv.weight", "model.layers.0.self_attn.qkv_proj.weight", {8, 4}},
        {"decoder.layers.0.self_attention.linear_proj.weight", "model.layers.0.self_attn.o_proj.weight", {4, 4}},
        {"decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "model.layers.0.post_attention_layernorm.weight", {4}},
        {"decoder.layers.0.mlp.linear_fc1.weight", "model.layers.0.mlp.gate_up_proj.weight", {12, 4}},
        {"decoder.layers.0.mlp.linear_fc2.weight", "model.layers.0.mlp.down_proj.weight", {4, 6}},
        {"decoder.final_layernorm.weight", "model.norm.weight", {4}},
    };
    constexpr std::size_t most = 64 * 4; // elements of a parameter
    static float memory[2][std::size(params)][most];

    const char *model = R"({"architectures": ["LlamaForCausalLM"], "hidden_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 6, "vocab_size": 64,
        "tie_word_embeddings": true, "torch_dtype": "float32"})";
    const std::string spec = std::string(R"({"model": )") + model + R"(,
        "source": {"framework": "megatron", "ranks": [0], "make_vocab_size_divisible_by": 64},
        "target": {"framework": "vllm", "ranks": [0]}})";
    Preset preset(spec.c_str(), 0);
    EXPECT(status_of([&] { preset.layout(); }) < 0); // nothing is bound
    for (std::size_t i = 0; i < std::size(params); i++) {
        const reshard::Dims &shape = params[i].shape;
        const uint64_t count = static_cast<uint64_t>(shape[0] * (shape.count() == 2 ? shape[1] : 1));
        for (std::size_t element = 0; element < count; element++) memory[0][i][element] = static_cast<float>(1 + i * most + element);
        preset.bind(params[i].trained, memory[0][i], count * sizeof(float), reshard::f32, shape, RS_SOURCE);
        preset.bind(params[i].served, memory[1][i], count * sizeof(float), reshard::f32, shape, RS_TARGET);
    }
    EXPECT(status_of([&] { preset.bind("lm_head.weight", memory, 4, reshard::f32, {1}, RS_TARGET); }) == RS_ERR_NOT_FOUND);
    EXPECT(preset.layout().buffer_count == 2 * std::size(params));
    EXPECT(preset.describe(RS_DESCRIBE_LAYOUT).find("\"model.norm.weight\"") != std::string::npos);

    Comm comm = Comm::loopback(79, 0, 1);
    Container container(reshard::config(comm), preset), by_tables(reshard::config(comm), preset.layout());
    container.connect();
    container.sync(1);
    // With one query group and no cut both frameworks order all rows alike.
    for (std::size_t i = 0; i < std::size(params); i++)
        for (std::size_t element = 0; element < most; element++) EXPECT(memory[0][i][element] == memory[1][i][element]);
    container.rebind(preset);
    container.sync(2);
}

int main() {
    EXPECT(status_of([] { Comm::custom(reshard::sized<rs_comm_ops_t>()); }) == RS_ERR_INVALID);
    EXPECT(status_of([] { Comm::local(nullptr, 0, 1); }) == RS_ERR_INVALID);
    try {
        reshard::Dims({1, 2, 3, 4, 5, 6, 7, 8, 9});
        std::abort();
    } catch (const std::length_error &) {
    }
    preset();
    std::thread first(rank, 0);
    std::thread second(rank, 1);
    first.join();
    second.join();
    std::puts("done");
}
