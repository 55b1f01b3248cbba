/*
 * libreshard for C++17: handles that destroy themselves, statuses as exceptions, tables that grow.
 *
 * All of it is inline over reshard.h, whose conventions hold here too: what is collective, what is borrowed, who may call what when.
 * Handles can be moved, not copied. A handle that was moved from may only be destroyed or assigned to.
 *
 *     reshard::Comm comm = reshard::Comm::local("run-17", rank, world);
 *     reshard::Layout layout;
 *     auto tensor = layout.tensor("model.norm.weight", {1024});
 *     auto buffer = layout.buffer("norm", data, bytes, reshard::bf16, {1024}, RS_TARGET);
 *     layout.tile(tensor, buffer);
 *     reshard::Container container(reshard::config(comm), layout);
 *     container.connect();
 *     container.sync(1);
 */
#ifndef RESHARD_HPP
#define RESHARD_HPP

#include "reshard.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace reshard {

/** A failed call: what() is the status' name and the text of rs_last_error(). */
class Error : public std::runtime_error {
  public:
    /** The failure that this thread's last call answered. */
    explicit Error(rs_status_t status)
        : std::runtime_error(std::string(rs_status_name(status)) + ": " + rs_last_error()), status_(status) {}

    rs_status_t status() const noexcept { return status_; }
    /** The container failed: it needs a new communicator and connect(). */
    bool is_fatal() const noexcept { return RS_IS_FATAL(status_); }

  private:
    rs_status_t status_;
};

/** Throws Error for a negative status; else returns it (RS_OK or RS_IN_PROGRESS). */
inline rs_status_t check(rs_status_t status) {
    if (status < 0) throw Error(status);
    return status;
}

/** A zeroed struct of reshard.h with its struct_size set. */
template <class T> T sized() {
    T value{};
    value.struct_size = sizeof value;
    return value;
}

/** DLPack's element types. */
inline constexpr rs_dtype_t bf16{4, 16, 1}, f16{2, 16, 1}, f32{2, 32, 1}, f64{2, 64, 1};
inline constexpr rs_dtype_t i8{0, 8, 1}, i16{0, 16, 1}, i32{0, 32, 1}, i64{0, 64, 1}, u8{1, 8, 1};

namespace detail {

/** An owned pointer that End gives back. */
template <class T, void (*End)(T *)> class Handle {
  public:
    Handle() noexcept = default;
    explicit Handle(T *ptr) noexcept : ptr_(ptr) {}
    Handle(Handle &&other) noexcept : ptr_(std::exchange(other.ptr_, nullptr)) {}
    Handle &operator=(Handle &&other) noexcept {
        std::swap(ptr_, other.ptr_);
        return *this;
    }
    Handle(const Handle &) = delete;
    Handle &operator=(const Handle &) = delete;
    ~Handle() { End(ptr_); }

    T *get() const noexcept { return ptr_; }
    /** The pointer, the caller's to destroy from here on. */
    T *release() noexcept { return std::exchange(ptr_, nullptr); }

  private:
    T *ptr_ = nullptr;
};

/** All bytes of a call that answers RS_ERR_TOO_SMALL and the length it needs. */
template <class Call> std::string all(Call call) {
    std::string out(1024, '\0');
    std::size_t len = 0;
    rs_status_t status;
    while ((status = call(&out[0], out.size(), &len)) == RS_ERR_TOO_SMALL) out.resize(len);
    check(status);
    out.resize(len);
    return out;
}

/** As above, of text that ends with NUL, which is left out. */
template <class Call> std::string all_text(Call call) {
    std::string text = all(call);
    text.pop_back();
    return text;
}

} // namespace detail

/** A communicator. Containers take references of their own, so it may go before they do. */
class Comm : public detail::Handle<rs_comm_t, rs_comm_destroy> {
  public:
    using Handle::Handle;

    /** rs_comm_local(). Collective. */
    static Comm local(const char *name, int32_t rank, int32_t world, uint32_t timeout_ms = 0, uint32_t flags = 0) {
        auto given = sized<rs_comm_local_t>();
        given.name = name;
        given.rank = rank;
        given.world = world;
        given.timeout_ms = timeout_ms;
        given.flags = flags;
        rs_comm_t *out = nullptr;
        check(rs_comm_local(&given, &out));
        return Comm(out);
    }

    /** rs_comm_loopback(). */
    static Comm loopback(uint64_t hub, int32_t rank, int32_t world) {
        rs_comm_t *out = nullptr;
        check(rs_comm_loopback(hub, rank, world, &out));
        return Comm(out);
    }

    /** rs_comm_nixl(). Collective. */
    static Comm nixl(const char *config_json, int32_t rank, int32_t world) {
        rs_comm_t *out = nullptr;
        check(rs_comm_nixl(config_json, rank, world, &out));
        return Comm(out);
    }

    /** rs_comm_composite(). Collective. */
    static Comm composite(const Comm &near, const Comm &wide) {
        rs_comm_t *out = nullptr;
        check(rs_comm_composite(near.get(), wide.get(), &out));
        return Comm(out);
    }

    /** rs_comm_custom(). */
    static Comm custom(const rs_comm_ops_t &ops) {
        rs_comm_t *out = nullptr;
        check(rs_comm_custom(&ops, &out));
        return Comm(out);
    }
};

/** Memory of rs_mem_alloc(). It outlives the containers that use it. */
class Mem : public detail::Handle<void, rs_mem_free> {
  public:
    Mem() noexcept = default;
    explicit Mem(uint64_t bytes, uint32_t flags = 0) : Handle(alloc(bytes, flags)), size_(bytes) {}

    void *data() const noexcept { return get(); }
    uint64_t size() const noexcept { return size_; }

  private:
    static void *alloc(uint64_t bytes, uint32_t flags) {
        void *out = nullptr;
        check(rs_mem_alloc(bytes, flags, &out));
        return out;
    }

    uint64_t size_ = 0;
};

/** At most RS_MAX_RANK numbers: a shape, an origin, strides. */
class Dims {
  public:
    Dims() noexcept = default;
    Dims(std::initializer_list<int64_t> values) : Dims(values.begin(), values.size()) {}
    Dims(const std::vector<int64_t> &values) : Dims(values.data(), values.size()) {}
    Dims(const int64_t *values, std::size_t count) : count_(static_cast<uint32_t>(count)) {
        if (count > RS_MAX_RANK) throw std::length_error("reshard: more than RS_MAX_RANK axes");
        for (std::size_t i = 0; i < count; i++) values_[i] = values[i];
    }

    uint32_t count() const noexcept { return count_; }
    const int64_t *data() const noexcept { return values_; }
    int64_t operator[](std::size_t i) const noexcept { return values_[i]; }
    void copy_to(int64_t (&row)[RS_MAX_RANK]) const noexcept {
        for (std::size_t i = 0; i < RS_MAX_RANK; i++) row[i] = values_[i];
    }
    /** The strides of a dense block of this shape, the last axis fastest. */
    Dims dense() const noexcept {
        Dims strides;
        strides.count_ = count_;
        int64_t step = 1;
        for (std::size_t i = count_; i-- > 0; step *= values_[i]) strides.values_[i] = step;
        return strides;
    }

  private:
    uint32_t count_ = 0;
    int64_t values_[RS_MAX_RANK] = {};
};

/** One rank's tables while they are made. A container copies them; the layout may go then. */
class Layout {
  public:
    /** Adds a logical tensor; returns its row. */
    uint32_t tensor(std::string name, const Dims &shape) {
        rs_tensor_t row{};
        row.name = keep(std::move(name));
        row.rank = shape.count();
        shape.copy_to(row.shape);
        return add(tensors_, row);
    }

    /** Adds a buffer of dense host memory; returns its row, which row() can change. */
    uint32_t buffer(std::string name, void *data, uint64_t size_bytes, rs_dtype_t dtype, const Dims &shape, uint32_t role) {
        return buffer(std::move(name), data, size_bytes, dtype, shape, shape.dense(), role);
    }

    /** Adds a buffer of host memory with strides; returns its row, which row() can change. */
    uint32_t buffer(std::string name, void *data, uint64_t size_bytes, rs_dtype_t dtype, const Dims &shape, const Dims &strides,
                    uint32_t role) {
        rs_buffer_t row{};
        row.name = keep(std::move(name));
        row.data = data;
        row.size_bytes = size_bytes;
        row.device_type = RS_DEVICE_CPU;
        row.role = role;
        row.dtype = dtype;
        row.ndim = shape.count();
        shape.copy_to(row.shape);
        strides.copy_to(row.strides);
        return add(buffers_, row);
    }

    /** A buffer's row, for its device or flags. */
    rs_buffer_t &row(uint32_t buffer) { return buffers_.at(buffer); }

    /** The whole tensor lies dense from the buffer's byte `byte_offset` on. */
    void tile(uint32_t tensor, uint32_t buffer, uint64_t byte_offset = 0) {
        const rs_tensor_t &whole = tensors_.at(tensor);
        const Dims shape(whole.shape, whole.rank);
        tile(tensor, buffer, byte_offset, shape, Dims(), shape, shape.dense());
    }

    /** The box [origin, origin + extent) of the tensor lies from the buffer's byte `byte_offset` on, with these strides. */
    void tile(uint32_t tensor, uint32_t buffer, uint64_t byte_offset, const Dims &origin, const Dims &extent, const Dims &stride) {
        const rs_tensor_t &whole = tensors_.at(tensor);
        tile(tensor, buffer, byte_offset, Dims(whole.shape, whole.rank), origin, extent, stride);
    }

    /** As above, the box taken of `view`, a reshape of the tensor. Missing entries of origin are 0. */
    void tile(uint32_t tensor, uint32_t buffer, uint64_t byte_offset, const Dims &view, const Dims &origin, const Dims &extent,
              const Dims &stride) {
        rs_tile_t row{};
        row.tensor = tensor;
        row.buffer = buffer;
        row.rank = view.count();
        row.byte_offset = byte_offset;
        view.copy_to(row.view);
        origin.copy_to(row.origin);
        extent.copy_to(row.extent);
        stride.copy_to(row.stride);
        tiles_.push_back(row);
    }

    /** The tables as C wants them, valid while the layout is neither changed nor moved nor destroyed. */
    rs_layout_t get() const noexcept {
        auto out = sized<rs_layout_t>();
        out.tensors = tensors_.data();
        out.tensor_count = tensors_.size();
        out.tensor_size = sizeof(rs_tensor_t);
        out.buffers = buffers_.data();
        out.buffer_count = buffers_.size();
        out.buffer_size = sizeof(rs_buffer_t);
        out.tiles = tiles_.data();
        out.tile_count = tiles_.size();
        out.tile_size = sizeof(rs_tile_t);
        return out;
    }

    Layout() = default;
    // A copy's rows would point to the names of the original.
    Layout(const Layout &) = delete;
    Layout &operator=(const Layout &) = delete;
    Layout(Layout &&) = default;
    Layout &operator=(Layout &&) = default;

  private:
    template <class Row> static uint32_t add(std::vector<Row> &rows, const Row &row) {
        rows.push_back(row);
        return static_cast<uint32_t>(rows.size() - 1);
    }
    const char *keep(std::string name) { return names_.emplace_back(std::move(name)).c_str(); }

    std::deque<std::string> names_; // a deque's elements stay where they are
    std::vector<rs_tensor_t> tensors_;
    std::vector<rs_buffer_t> buffers_;
    std::vector<rs_tile_t> tiles_;
};

/** A world spec and one rank's memory, instead of tables. A container copies them; the preset may go then. */
class Preset : public detail::Handle<rs_preset_t, rs_preset_destroy> {
  public:
    using Handle::Handle;

    /** rs_preset_create(). */
    Preset(const char *spec_json, int32_t rank) : Handle(create(spec_json, rank)) {}

    /** rs_preset_bind(). */
    void bind(const rs_bind_t &given) { check(rs_preset_bind(get(), &given)); }
    /** Binds dense host memory to a parameter, under the framework's own name. */
    void bind(const char *name, void *data, uint64_t size_bytes, rs_dtype_t dtype, const Dims &shape, uint32_t role,
              uint32_t model_chunk = 0) {
        auto given = sized<rs_bind_t>();
        given.name = name;
        given.role = role;
        given.model_chunk = model_chunk;
        given.data = data;
        given.size_bytes = size_bytes;
        given.device_type = RS_DEVICE_CPU;
        given.dtype = dtype;
        given.ndim = shape.count();
        given.shape = shape.data();
        bind(given);
    }

    /** rs_preset_layout(): the tables that the spec stands for, borrowed until the next bind or destroy. */
    rs_layout_t layout() {
        auto out = sized<rs_layout_t>();
        check(rs_preset_layout(get(), &out));
        return out;
    }

    /** rs_preset_describe(): JSON. */
    std::string describe(uint32_t what) const {
        return detail::all_text(
            [&](char *buf, std::size_t cap, std::size_t *len) { return rs_preset_describe(get(), what, buf, cap, len); });
    }

  private:
    static rs_preset_t *create(const char *spec_json, int32_t rank) {
        rs_preset_t *out = nullptr;
        check(rs_preset_create(spec_json, rank, &out));
        return out;
    }
};

/** A config for host memory and this communicator, to be changed as needed. */
inline rs_config_t config(const Comm &comm) {
    auto out = sized<rs_config_t>();
    out.abi = RS_ABI;
    out.comm = comm.get();
    return out;
}

/** A container. */
class Container : public detail::Handle<rs_container_t, rs_container_destroy> {
  public:
    using Handle::Handle;

    /** rs_container_create(). */
    Container(const rs_config_t &config, const rs_layout_t &layout) : Handle(create(config, &layout)) {}
    Container(const rs_config_t &config, const Layout &layout) : Container(config, layout.get()) {}
    Container(const rs_config_t &config, const Preset &preset) : Handle(create(with(config, preset), nullptr)) {}

    /** rs_container_connect(). Collective. */
    void connect() { check(rs_container_connect(get())); }

    /** rs_sync_weights(). Collective. True: every rank has landed; false: enqueued, poll() tells the end. */
    bool sync(const rs_sync_t &request) { return check(rs_sync_weights(get(), &request)) == RS_OK; }
    bool sync(uint64_t version) {
        auto request = sized<rs_sync_t>();
        request.version = version;
        return sync(request);
    }

    /** rs_container_poll(). True: done. */
    bool poll() const { return check(rs_container_poll(get())) == RS_OK; }

    /** rs_container_abort(). */
    void abort() const { check(rs_container_abort(get())); }

    /** rs_container_rebind(). */
    void rebind(const Layout &layout) {
        const rs_layout_t tables = layout.get();
        check(rs_container_rebind(get(), &tables, nullptr));
    }
    void rebind(const Preset &preset) { check(rs_container_rebind(get(), nullptr, preset.get())); }

    /** rs_container_set_comm(). */
    void set_comm(const Comm &comm) { check(rs_container_set_comm(get(), comm.get())); }

    /** rs_get_param(). */
    rs_param_t param(const char *name) const {
        auto out = sized<rs_param_t>();
        check(rs_get_param(get(), name, &out));
        return out;
    }

    /** rs_get_param_at(). */
    rs_param_t param_at(std::size_t index) const {
        auto out = sized<rs_param_t>();
        check(rs_get_param_at(get(), index, &out));
        return out;
    }

    /** rs_fingerprint(). Collective. */
    std::array<uint8_t, 16> fingerprint(uint32_t role, const char *tensor = nullptr) const {
        std::array<uint8_t, 16> out{};
        check(rs_fingerprint(get(), role, tensor, out.data()));
        return out;
    }

    /** rs_container_describe(): JSON. */
    std::string describe(uint32_t what, const char *param = nullptr) const {
        return detail::all_text([&](char *buf, std::size_t cap, std::size_t *len) {
            return rs_container_describe(get(), what, param, buf, cap, len);
        });
    }

    /** rs_container_export(): this rank's tables as bytes. */
    std::string exported() const {
        return detail::all(
            [&](char *buf, std::size_t cap, std::size_t *len) { return rs_container_export(get(), buf, cap, len); });
    }

    /** rs_container_import(): another rank's exported(). */
    void import_tables(const std::string &blob) { check(rs_container_import(get(), blob.data(), blob.size())); }

  private:
    static rs_container_t *create(const rs_config_t &config, const rs_layout_t *layout) {
        rs_container_t *out = nullptr;
        check(rs_container_create(&config, layout, &out));
        return out;
    }
    static rs_config_t with(rs_config_t config, const Preset &preset) {
        config.preset = preset.get();
        return config;
    }
};

} // namespace reshard

#endif /* RESHARD_HPP */
