#include "segment.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace standin {
namespace {

constexpr uint64_t kMagic = 0x7374616e64696e00u + sizeof(Segment);

const char* segment_name() {
    const char* name = std::getenv("STANDIN_VERBS_SHM");
    return name != nullptr && *name != '\0' ? name : "/standin_verbs";
}

// Each process holds a lock on the byte of the file that its place numbers; the system takes it from a dead one.
struct flock lock_of(uint32_t place, short type) {
    struct flock lock {};
    lock.l_type = type, lock.l_whence = SEEK_SET, lock.l_start = place, lock.l_len = 1;
    return lock;
}

}  // namespace

bool Membership::open(std::string* error) {
    const auto fail = [&](const char* what) {
        *error = std::string(what) + " " + segment_name() + ": " + std::strerror(errno);
        if (file_ >= 0) close(file_);
        file_ = -1;
        return false;
    };
    struct stat facts {};
    do {  // again if the last of others has removed the name between our open and our lock
        if (file_ >= 0) close(file_);
        file_ = shm_open(segment_name(), O_RDWR | O_CREAT, 0600);
        if (file_ < 0) return fail("opening");
        if (flock(file_, LOCK_EX) != 0 || fstat(file_, &facts) != 0) return fail("locking");
    } while (facts.st_nlink == 0);
    if (static_cast<size_t>(facts.st_size) != sizeof(Segment)) {
        if (ftruncate(file_, 0) != 0 || ftruncate(file_, sizeof(Segment)) != 0) return fail("sizing");
        // Pages that are missing later would end the process.
        const int status = posix_fallocate(file_, 0, sizeof(Segment));
        if (status != 0 && status != EOPNOTSUPP && status != EINVAL) {
            errno = status;
            return fail("reserving memory for");
        }
    }
    void* const address = mmap(nullptr, sizeof(Segment), PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
    if (address == MAP_FAILED) return fail("mapping");
    segment_ = static_cast<Segment*>(address);
    return true;
}

bool Membership::join(std::string* error) {
    if (!open(error)) return false;
    process_ = kMaxProcesses;  // nobody's place yet
    bool somebody_lives = false;
    for (uint32_t place = 0; place < kMaxProcesses; ++place) somebody_lives |= is_alive(place);
    if (segment_->magic != kMagic || !somebody_lives) {
        std::memset(static_cast<void*>(segment_), 0, offsetof(Segment, chunks));
        segment_->magic = kMagic;
    }
    uint32_t place = 0;
    while (place < kMaxProcesses && is_alive(place)) ++place;
    struct flock lock = lock_of(place, F_WRLCK);
    if (place < kMaxProcesses && fcntl(file_, F_SETLK, &lock) == 0) {
        for (SharedPair& pair : segment_->pairs)  // of a process that died in this place
            if (pair.number != 0 && pair.owner == place) pair.number = 0;
        segment_->processes[place].pid = getpid();
        process_ = place;
        ++segment_->changes;
    }
    flock(file_, LOCK_UN);
    if (process_ == kMaxProcesses) {
        *error = std::string("all places of ") + segment_name() + " are taken";
        munmap(segment_, sizeof(Segment));
        close(file_);
        segment_ = nullptr, file_ = -1;
        return false;
    }
    return true;
}

void Membership::leave() {
    if (segment_ == nullptr) return;
    flock(file_, LOCK_EX);
    segment_->processes[process_].pid = 0;
    bool somebody_lives = false;
    for (uint32_t place = 0; place < kMaxProcesses; ++place) somebody_lives |= place != process_ && is_alive(place);
    if (!somebody_lives) shm_unlink(segment_name());
    flock(file_, LOCK_UN);
    munmap(segment_, sizeof(Segment));
    close(file_);
    segment_ = nullptr, file_ = -1;
}

bool Membership::is_alive(uint32_t process) const {
    if (process == process_) return true;
    if (segment_->processes[process].pid == 0) return false;
    struct flock lock = lock_of(process, F_WRLCK);
    return fcntl(file_, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

SharedPair* Membership::take_pair() {
    for (uint32_t i = 0; i < kMaxPairs; ++i) {
        const uint32_t place = segment_->next_pair.fetch_add(1) % kMaxPairs;
        SharedPair& pair = segment_->pairs[place];
        uint32_t free = 0;
        if (!pair.number.compare_exchange_strong(free, UINT32_MAX)) continue;
        const uint32_t generation = pair.generation.fetch_add(1) % 0x3fff + 1;
        pair.owner = process_;
        pair.remote = 0, pair.state = IBV_QPS_RESET, pair.access = 0, pair.receiver_retries = kEndless;
        pair.sent = 0, pair.answered = 0;
        pair.number = generation * kMaxPairs + place;  // 24 bits
        return &pair;
    }
    return nullptr;
}

SharedPair* Membership::find_pair(uint32_t number) const {
    SharedPair& pair = segment_->pairs[number % kMaxPairs];
    return number != 0 && pair.number == number ? &pair : nullptr;
}

}  // namespace standin
