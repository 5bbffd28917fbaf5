#include "pair.hpp"

#include <algorithm>
#include <cstring>

#include "log.hpp"

namespace standin {
namespace {

constexpr auto kPatience = std::chrono::seconds(3);                // for a remote pair that is not there
constexpr auto kReceiverPatience = std::chrono::milliseconds(20);  // for a receive request, times the retries
constexpr uint64_t kFlagBytes = 64;  // messages up to this size may be what somebody waits for: they land behind everything before

ibv_wc_opcode completed_opcode(ibv_wr_opcode opcode) {
    switch (opcode) {
        case IBV_WR_RDMA_WRITE:
        case IBV_WR_RDMA_WRITE_WITH_IMM:
            return IBV_WC_RDMA_WRITE;
        case IBV_WR_RDMA_READ:
            return IBV_WC_RDMA_READ;
        case IBV_WR_ATOMIC_FETCH_AND_ADD:
            return IBV_WC_FETCH_ADD;
        case IBV_WR_ATOMIC_CMP_AND_SWP:
            return IBV_WC_COMP_SWAP;
        default:
            return IBV_WC_SEND;
    }
}

}  // namespace

void Pair::set_state(ibv_qp_state state) {
    place_.state = state;
    if (verbs != nullptr) verbs->state = state;
    ++shared_.membership.segment().changes;
}

void Pair::reset() {
    sends.complete_until(sends.posted());
    next_ = done_until_ = sends.posted();
    next_offset_ = 0;
    for (; taken_ < prepared_; ++taken_)
        if (sent_[taken_ % kWindow].chunk != kNoChunk) shared_.free_chunks.push_back(sent_[taken_ % kWindow].chunk);
    prepared_ = taken_ = 0;
    place_.sent = 0, place_.answered = 0;
    failure_ = IBV_WC_SUCCESS;
    waits_since_.reset();
    sender_ = nullptr;
    has_refused_ = false;
    receiving_.reset();
    lacks_receive_since_.reset();
}

void Pair::find_sender() {
    sender_ = nullptr;
    if (state() != IBV_QPS_RTR && state() != IBV_QPS_RTS && state() != IBV_QPS_ERR) return;
    SharedPair* const remote = shared_.membership.find_pair(place_.remote);
    if (remote == nullptr || remote->remote != number_) return;
    sender_ = remote;
    sender_process_ = remote->owner;
    executed_ = remote->answered;
}

uint8_t* Pair::data_of(Packet& packet, uint32_t owner) {
    return packet.chunk == kNoChunk ? packet.payload : shared_.chunk(owner, packet.chunk);
}

bool Pair::scatter(const ibv_sge* sges, uint32_t num_sges, uint64_t offset, uint8_t* data, uint64_t num_bytes, bool is_to_region) {
    for (uint32_t i = 0; i < num_sges && num_bytes > 0; ++i) {
        if (offset >= sges[i].length) {
            offset -= sges[i].length;
            continue;
        }
        const uint64_t count = std::min(num_bytes, sges[i].length - offset), address = sges[i].addr + offset;
        const Region* const region = shared_.regions.find(sges[i].lkey, address, count, is_to_region ? IBV_ACCESS_LOCAL_WRITE : 0);
        if (region == nullptr) return false;
        if (is_to_region)
            shared_.copier.to_region(*region, address, data, count);
        else
            shared_.copier.from_region(*region, address, data, count);
        data += count, num_bytes -= count, offset = 0;
    }
    return num_bytes == 0;
}

// --- requester ------------------------------------------------------------------------------------------------------

void Pair::note_remote(bool is_there) {
    if (is_there)
        waits_since_.reset();
    else if (!waits_since_)
        waits_since_ = Clock::now();
}

bool Pair::can_reach_remote() {
    SharedPair* const remote = shared_.membership.find_pair(place_.remote);
    const bool is_ready = remote != nullptr && remote->remote == number_ &&
                          (remote->state == IBV_QPS_RTR || remote->state == IBV_QPS_RTS) && shared_.is_alive(remote->owner);
    note_remote(is_ready);
    return is_ready;
}

ibv_wc_status Pair::check_local(const Send& send) const {
    if (send.is_inline()) return IBV_WC_SUCCESS;
    const int rights = send.brings_data_back() ? IBV_ACCESS_LOCAL_WRITE : 0;
    for (uint32_t i = 0; i < send.num_sges; ++i) {
        const ibv_sge& sge = send.sges[i];
        if (sge.length != 0 && shared_.regions.find(sge.lkey, sge.addr, sge.length, rights) == nullptr) return IBV_WC_LOC_PROT_ERR;
    }
    return IBV_WC_SUCCESS;
}

// False if there is no chunk for the data now.
bool Pair::prepare_one(const Send& send) {
    const uint64_t left = send.num_bytes - next_offset_;
    const auto num_bytes = static_cast<uint32_t>(send.is_atomic() ? 0 : std::min<uint64_t>(left, kChunkBytes));
    Packet& packet = place_.packets[prepared_ % kWindow];
    packet.chunk = kNoChunk;
    if (num_bytes > kPayloadBytes) {
        if (shared_.free_chunks.empty()) return false;
        packet.chunk = shared_.free_chunks.back();
        shared_.free_chunks.pop_back();
    }
    packet.opcode = send.opcode;
    packet.is_first = next_offset_ == 0;
    packet.is_last = send.is_atomic() || num_bytes == left;
    packet.has_immediate = send.opcode == IBV_WR_RDMA_WRITE_WITH_IMM || send.opcode == IBV_WR_SEND_WITH_IMM;
    packet.immediate = send.immediate;
    packet.remote_key = send.remote_key;
    packet.remote_address = send.remote_address + next_offset_;
    packet.offset = next_offset_;
    packet.message_bytes = send.num_bytes;
    packet.num_bytes = num_bytes;
    packet.compare_or_add = send.compare_or_add;
    packet.swap = send.swap;
    packet.status = IBV_WC_SUCCESS;
    sent_[prepared_ % kWindow] = {next_, next_offset_, num_bytes, packet.is_last, packet.chunk};
    uint8_t* const data = data_of(packet, shared_.membership.process());
    if (send.is_inline())
        std::memcpy(data, send.inline_data + next_offset_, num_bytes);
    else if (!send.brings_data_back() && !scatter(send.sges, send.num_sges, next_offset_, data, num_bytes, false))
        packet.status = IBV_WC_LOC_PROT_ERR;  // its region has gone since it was checked; nobody executes this
    next_offset_ += num_bytes;
    if (packet.is_last) ++next_, next_offset_ = 0;
    ++prepared_;
    return true;
}

bool Pair::prepare_packets() {
    if (state() != IBV_QPS_RTS || failure_ != IBV_WC_SUCCESS || next_ == sends.posted()) return false;
    if (!can_reach_remote()) return false;
    const uint64_t before = prepared_;
    while (next_ < sends.posted() && prepared_ - taken_ < kWindow) {
        const Send& send = sends.at(next_);
        const bool is_alone = is_idle() && done_until_ == next_;
        if ((send.flags & IBV_SEND_FENCE) != 0 && next_offset_ == 0 && !is_alone) break;
        if (next_offset_ == 0 && check_local(send) != IBV_WC_SUCCESS) {
            if (!is_alone) break;  // what was sent before completes first
            failure_ = check_local(send);
            return true;
        }
        if (!prepare_one(send)) break;
    }
    return prepared_ != before;
}

bool Pair::take_answers() {
    const uint64_t answered = place_.answered.load(std::memory_order_acquire);
    const uint64_t before = taken_;
    for (; taken_ < answered; ++taken_) {
        Packet& packet = place_.packets[taken_ % kWindow];
        const Sent& sent = sent_[taken_ % kWindow];
        if (sent.chunk != kNoChunk) chunks_to_free_.push_back(sent.chunk);
        if (failure_ != IBV_WC_SUCCESS) continue;
        const Send& send = sends.at(sent.request);
        ibv_wc_status status = packet.status;
        uint8_t* const data = data_of(packet, shared_.membership.process());
        if (status == IBV_WC_SUCCESS && send.is_read()) {
            // A read onto itself serves to order memory, and must not write back what may have changed since.
            const bool is_onto_itself =
                send.num_sges == 1 && send.sges[0].addr == send.remote_address && send.sges[0].lkey == send.remote_key;
            if (!is_onto_itself && !scatter(send.sges, send.num_sges, sent.offset, data, sent.num_bytes, true))
                status = IBV_WC_LOC_PROT_ERR;
        } else if (status == IBV_WC_SUCCESS && send.is_atomic()) {
            // By way of the payload: a copy that lands later reads it.
            std::memcpy(packet.payload, &packet.word_before, 8);
            if (!scatter(send.sges, send.num_sges, 0, packet.payload, 8, true)) status = IBV_WC_LOC_PROT_ERR;
        }
        if (status != IBV_WC_SUCCESS)
            done_until_ = sent.request, failure_ = status;
        else if (sent.is_last)
            done_until_ = sent.request + 1;
    }
    if (!is_idle() && state() != IBV_QPS_RESET) {
        SharedPair* const remote = shared_.membership.find_pair(place_.remote);
        note_remote(remote != nullptr && remote->remote == number_ && shared_.is_alive(remote->owner));
    }
    if (waits_since_ && Clock::now() - *waits_since_ > kPatience) {
        waits_since_.reset();
        say("queue pair %u: the remote pair %u is not there", number_, place_.remote.load());
        for (; taken_ < prepared_; ++taken_)  // nobody is left who might use them
            if (sent_[taken_ % kWindow].chunk != kNoChunk) chunks_to_free_.push_back(sent_[taken_ % kWindow].chunk);
        if (failure_ == IBV_WC_SUCCESS) failure_ = IBV_WC_RETRY_EXC_ERR;
        return true;
    }
    return taken_ != before;
}

void Pair::complete(uint64_t request, ibv_wc_status status) {
    const Send& send = sends.at(request);
    const bool is_reported = status != IBV_WC_SUCCESS || completes_all || (send.flags & IBV_SEND_SIGNALED) != 0;
    ibv_wc completion{};
    completion.wr_id = send.id;
    completion.status = status;
    completion.opcode = completed_opcode(send.opcode);
    completion.byte_len = static_cast<uint32_t>(send.num_bytes);
    completion.qp_num = number_;
    completion.src_qp = place_.remote;
    // First the place: whoever sees the completion may post another request.
    sends.complete_until(request + 1);
    if (is_reported) send_completions->push(completion);
}

void Pair::flush() {
    const uint64_t posted = sends.posted();
    for (uint64_t request = sends.completed(); request < posted; ++request) complete(request, IBV_WC_WR_FLUSH_ERR);
    next_ = done_until_ = posted;
    next_offset_ = 0;
}

void Pair::publish(bool have_landed) {
    if (!have_landed && state() == IBV_QPS_RTS && failure_ == IBV_WC_SUCCESS && sends.completed() < sends.posted()) {
        done_until_ = sends.completed();
        failure_ = IBV_WC_GENERAL_ERR;
    }
    // As responder first: an answer may be to a packet of this very pair.
    for (const ibv_wc& completion : receive_done_) receive_completions->push(completion);
    receive_done_.clear();
    if (sender_ != nullptr) {
        if (!have_landed)
            for (uint64_t i = sender_->answered; i < executed_; ++i) sender_->packets[i % kWindow].status = IBV_WC_REM_OP_ERR;
        sender_->answered.store(executed_, std::memory_order_release);
    }
    // As requester.
    place_.sent.store(prepared_, std::memory_order_release);
    shared_.free_chunks.insert(shared_.free_chunks.end(), chunks_to_free_.begin(), chunks_to_free_.end());
    chunks_to_free_.clear();
    for (uint64_t request = sends.completed(); request < done_until_; ++request) complete(request, IBV_WC_SUCCESS);
    if (failure_ != IBV_WC_SUCCESS && state() != IBV_QPS_ERR) {
        say("queue pair %u: request %lu ends with status %d", number_, sends.at(done_until_).id, failure_);
        complete(done_until_++, failure_);
        set_state(IBV_QPS_ERR);
    }
    if (state() == IBV_QPS_ERR && is_idle() && sends.completed() < sends.posted()) flush();
}

// --- responder ------------------------------------------------------------------------------------------------------

bool Pair::execute() {
    if (sender_ == nullptr) return false;
    const uint64_t sent = sender_->sent.load(std::memory_order_acquire), before = executed_;
    while (executed_ < sent) {
        Packet& packet = sender_->packets[executed_ % kWindow];
        if (has_refused_ || state() == IBV_QPS_ERR) {
            packet.status = IBV_WC_RETRY_EXC_ERR;
        } else if (packet.status == IBV_WC_SUCCESS) {
            if (execute_one(packet) == Executed::kLater) break;
            if (packet.status != IBV_WC_SUCCESS) {
                say("queue pair %u refuses a packet of %u: opcode %d, key %x, address %lx, %u bytes, status %d", number_,
                    sender_->number.load(), packet.opcode, packet.remote_key, packet.remote_address, packet.num_bytes, packet.status);
                has_refused_ = true;
                set_state(IBV_QPS_ERR);
            }
        }
        ++executed_;
    }
    return executed_ != before;
}

Pair::Executed Pair::execute_one(Packet& packet) {
    const bool needs_receive = (packet.is_last && packet.has_immediate && packet.opcode == IBV_WR_RDMA_WRITE_WITH_IMM) ||
                               (packet.is_first && (packet.opcode == IBV_WR_SEND || packet.opcode == IBV_WR_SEND_WITH_IMM));
    if (needs_receive) {
        const std::optional<Receive> receive = receives->take();
        if (!receive) {
            if (!lacks_receive_since_) lacks_receive_since_ = Clock::now();
            const uint32_t retries = sender_->receiver_retries;
            if (retries == kEndless || Clock::now() - *lacks_receive_since_ < kReceiverPatience * (retries + 1)) return Executed::kLater;
            packet.status = IBV_WC_RNR_RETRY_EXC_ERR;
            return Executed::kNow;
        }
        receiving_ = {*receive, false};
        lacks_receive_since_.reset();
    }
    if (packet.is_first && (packet.message_bytes <= kFlagBytes || packet.has_immediate) && shared_.copier.has_pending())
        shared_.copier.finish();
    uint8_t* const data = data_of(packet, sender_process_);
    switch (packet.opcode) {
        case IBV_WR_RDMA_WRITE:
        case IBV_WR_RDMA_WRITE_WITH_IMM:
            packet.status = execute_write(packet, data);
            break;
        case IBV_WR_RDMA_READ:
            packet.status = execute_read(packet, data);
            break;
        case IBV_WR_SEND:
        case IBV_WR_SEND_WITH_IMM:
            packet.status = execute_send(packet, data);
            break;
        default:
            packet.status = execute_atomic(packet);
    }
    shared_.counts.bytes += packet.num_bytes;
    if (packet.is_last && receiving_) {
        ibv_wc completion{};
        completion.wr_id = receiving_->receive.id;
        const bool is_send = packet.opcode == IBV_WR_SEND || packet.opcode == IBV_WR_SEND_WITH_IMM;
        completion.opcode = is_send ? IBV_WC_RECV : IBV_WC_RECV_RDMA_WITH_IMM;
        completion.status = packet.status == IBV_WC_SUCCESS ? IBV_WC_SUCCESS : IBV_WC_LOC_LEN_ERR;
        completion.byte_len = static_cast<uint32_t>(packet.message_bytes);
        completion.imm_data = packet.immediate;
        completion.wc_flags = packet.has_immediate ? IBV_WC_WITH_IMM : 0;
        completion.qp_num = number_;
        completion.src_qp = sender_->number;
        receive_done_.push_back(completion);
        receiving_.reset();
    }
    return Executed::kNow;
}

ibv_wc_status Pair::execute_write(Packet& packet, uint8_t* data) {
    ++shared_.counts.writes;
    if (packet.message_bytes == 0) return IBV_WC_SUCCESS;  // names no memory
    const Region* const region =
        shared_.regions.find(packet.remote_key, packet.remote_address, packet.num_bytes, IBV_ACCESS_REMOTE_WRITE);
    if (region == nullptr || (access() & IBV_ACCESS_REMOTE_WRITE) == 0) return IBV_WC_REM_ACCESS_ERR;
    shared_.copier.to_region(*region, packet.remote_address, data, packet.num_bytes);
    return IBV_WC_SUCCESS;
}

ibv_wc_status Pair::execute_read(Packet& packet, uint8_t* data) {
    ++shared_.counts.reads;
    if (packet.message_bytes == 0) return IBV_WC_SUCCESS;
    const Region* const region =
        shared_.regions.find(packet.remote_key, packet.remote_address, packet.num_bytes, IBV_ACCESS_REMOTE_READ);
    if (region == nullptr || (access() & IBV_ACCESS_REMOTE_READ) == 0) return IBV_WC_REM_ACCESS_ERR;
    shared_.copier.from_region(*region, packet.remote_address, data, packet.num_bytes);
    return IBV_WC_SUCCESS;
}

// All atomics on the memory of a process are executed by its agent, one after the other. Against the process itself they are atomic only in
// the memory of the host.
ibv_wc_status Pair::execute_atomic(Packet& packet) {
    ++shared_.counts.atomics;
    if (packet.remote_address % 8 != 0) return IBV_WC_REM_INV_REQ_ERR;
    const Region* const region = shared_.regions.find(packet.remote_key, packet.remote_address, 8, IBV_ACCESS_REMOTE_ATOMIC);
    if (region == nullptr || (access() & IBV_ACCESS_REMOTE_ATOMIC) == 0) return IBV_WC_REM_ACCESS_ERR;
    const bool is_add = packet.opcode == IBV_WR_ATOMIC_FETCH_AND_ADD;
    if (region->device == kHost) {
        auto* const word = reinterpret_cast<uint64_t*>(region->at(packet.remote_address));
        packet.word_before = packet.compare_or_add;
        if (is_add)
            packet.word_before = __atomic_fetch_add(word, packet.compare_or_add, __ATOMIC_ACQ_REL);
        else  // leaves what it found in word_before
            __atomic_compare_exchange_n(word, &packet.word_before, packet.swap, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
        return IBV_WC_SUCCESS;
    }
    shared_.copier.from_region(*region, packet.remote_address, packet.payload, 8);
    if (!shared_.copier.finish()) return IBV_WC_REM_OP_ERR;
    std::memcpy(&packet.word_before, packet.payload, 8);
    const bool writes = is_add || packet.word_before == packet.compare_or_add;
    const uint64_t word_after = is_add ? packet.word_before + packet.compare_or_add : packet.swap;
    std::memcpy(packet.payload, &word_after, 8);
    if (writes) shared_.copier.to_region(*region, packet.remote_address, packet.payload, 8);
    return IBV_WC_SUCCESS;
}

ibv_wc_status Pair::execute_send(Packet& packet, uint8_t* data) {
    ++shared_.counts.sends;
    if (!receiving_) return IBV_WC_REM_OP_ERR;
    uint64_t room = 0;
    for (uint32_t i = 0; i < receiving_->receive.num_sges; ++i) room += receiving_->receive.sges[i].length;
    if (packet.message_bytes > room) return IBV_WC_REM_INV_REQ_ERR;
    const Receive& receive = receiving_->receive;
    return scatter(receive.sges, receive.num_sges, packet.offset, data, packet.num_bytes, true) ? IBV_WC_SUCCESS
                                                                                               : IBV_WC_REM_OP_ERR;
}

}  // namespace standin
