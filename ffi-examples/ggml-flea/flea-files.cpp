// The GGUF files this process has open right now.
//
// llama.cpp keeps a model's files open while it creates and loads its tensors; /proc/self/fd shows them. Files are looked at
// without disturbing the host: by fstat, and by one pread of the magic for a file not seen before.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "flea-device.hpp"

namespace ggml_flea {
namespace {

struct FileId {
    dev_t device;
    ino_t inode;
    bool operator<(const FileId & other) const {
        return device != other.device ? device < other.device : inode < other.inode;
    }
};

// A regular file, looked at once for as long as it does not change.
struct SeenFile {
    off_t size = -1;
    time_t changed = 0;
    bool is_gguf = false;
    std::string first_shard;  // path of the model it belongs to
};

// The magic is read at an aligned place with an aligned length, because the host may have opened the file with O_DIRECT.
bool has_gguf_magic(int fd) {
    alignas(4096) static thread_local char page[4096];
    const ssize_t got = pread(fd, page, sizeof(page), 0);
    return got >= 4 && memcmp(page, "GGUF", 4) == 0;
}

// Guarded by the finder's mutex, like everything in here.
const SeenFile & look_at(int fd, const struct stat & status) {
    static auto * seen = new std::map<FileId, SeenFile>;
    SeenFile & file = (*seen)[{ status.st_dev, status.st_ino }];
    if (file.size == status.st_size && file.changed == status.st_mtime) { return file; }
    file = { status.st_size, status.st_mtime, false, "" };
    if (status.st_size < 24 || !has_gguf_magic(fd)) { return file; }
    char link[64];
    char path[4096];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    const ssize_t length = readlink(link, path, sizeof(path) - 1);
    if (length > 0) {
        file.is_gguf = true;
        file.first_shard = first_shard_of(std::string(path, (size_t) length));
    }
    return file;
}

}  // namespace

// "dir/name-00003-of-00007.gguf" -> "dir/name-00001-of-00007.gguf"; any other path stays.
std::string first_shard_of(const std::string & path) {
    static const char tail[] = "-00000-of-00000.gguf";
    const size_t tail_length = sizeof(tail) - 1;
    if (path.size() < tail_length) { return path; }
    std::string result = path;
    const size_t start = path.size() - tail_length;
    for (size_t i = 0; i < tail_length; ++i) {
        const char c = path[start + i];
        if (tail[i] == '0' ? (c < '0' || c > '9') : c != tail[i]) { return path; }
        if (i >= 1 && i <= 5) { result[start + i] = i == 5 ? '1' : '0'; }
    }
    return result;
}

std::string shard_path(const std::string & first_shard, uint32_t shard) {
    if (shard == 0) { return first_shard; }
    std::string path = first_shard;
    char number[16];
    snprintf(number, sizeof(number), "%05u", shard + 1);
    return path.replace(path.size() - strlen("00001-of-00000.gguf"), 5, number);
}

bool same_file(const std::string & a, const std::string & b) {
    struct stat sa, sb;
    return a == b || (stat(a.c_str(), &sa) == 0 && stat(b.c_str(), &sb) == 0 && sa.st_dev == sb.st_dev && sa.st_ino == sb.st_ino);
}

std::vector<int> open_fds() {
    std::vector<int> result;
    DIR * directory = opendir("/proc/self/fd");
    if (!directory) { return result; }
    while (const dirent * entry = readdir(directory)) {
        const int fd = atoi(entry->d_name);
        if (entry->d_name[0] != '.' && fd != dirfd(directory)) { result.push_back(fd); }
    }
    closedir(directory);
    return result;
}

std::set<std::string> open_model_files(const std::function<bool(int)> & is_own) {
    std::set<std::string> result;
    for (const int fd : open_fds()) {
        struct stat status;
        if (is_own(fd) || fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) { continue; }
        if ((fcntl(fd, F_GETFL) & O_ACCMODE) == O_WRONLY) { continue; }
        const SeenFile & file = look_at(fd, status);
        if (file.is_gguf) { result.insert(file.first_shard); }
    }
    return result;
}

}  // namespace ggml_flea
