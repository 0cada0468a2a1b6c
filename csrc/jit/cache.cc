#include "jit/cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>

#include "jit/sha256.h"

namespace deepgemm::jit {
namespace {

constexpr std::string_view kHeader = "deepgemm_jax kernel 1\n";
constexpr size_t kDigest = 64;

// A lock's holder may be stopped, or its machine gone: then it is better to compile twice.
constexpr auto kLongestWait = std::chrono::seconds(60);

std::error_code last_error() { return {errno, std::generic_category()}; }

std::string digest(const std::string& key, std::string_view body) {
  return Sha256().field(key).field(body).hex();
}

bool write_all(int file, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(file, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return false;
    bytes.remove_prefix(written);
  }
  return true;
}

std::optional<std::string> read_all(int directory, const std::string& name) {
  const int file = openat(directory, name.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return std::nullopt;
  std::string bytes;
  char buffer[1 << 16];
  ssize_t got;
  while ((got = ::read(file, buffer, sizeof buffer)) > 0 || (got < 0 && errno == EINTR)) {
    if (got > 0) bytes.append(buffer, got);
  }
  close(file);
  if (got < 0) return std::nullopt;
  return bytes;
}

std::string unique_name(const std::string& name) {
  std::random_device random;
  return name + "." + std::to_string(random()) + std::to_string(random()) + ".tmp";
}

}  // namespace

Cache::Cache(const std::string& path) : path_(path) {
  if (path.empty()) return;
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(path).parent_path(), error);
  if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST && !error) error = last_error();
  directory_ = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory_ < 0) {
    missing_ = error ? error : last_error();
    return;
  }

  struct stat status;
  const bool known = fstat(directory_, &status) == 0;
  const bool trusted_owner = known && (status.st_uid == geteuid() || status.st_uid == 0);
  if (trusted_owner && !(status.st_mode & (S_IWGRP | S_IWOTH))) return;
  close(directory_);
  throw std::runtime_error("The kernel cache " + path + " is refused, because another user " +
                           (trusted_owner ? "can write to it: run `chmod go-w` on it"
                                          : "owns it: take it over with `chown`, or remove it") +
                           ", or set DEEPGEMM_JAX_CACHE_DIR to a directory that is yours alone.");
}

Cache::~Cache() {
  if (directory_ >= 0) close(directory_);
}

std::optional<Cache::Entry> Cache::load(const std::string& key) const {
  const auto file = read_all(directory_, key + ".cubin");
  if (!file) return std::nullopt;
  std::string_view rest = *file;
  if (rest.substr(0, kHeader.size()) != kHeader) return std::nullopt;
  rest.remove_prefix(kHeader.size());
  if (rest.size() < kDigest) return std::nullopt;
  const std::string_view body = rest.substr(kDigest);
  if (rest.substr(0, kDigest) != digest(key, body)) return std::nullopt;

  // The checksum vouches for the rest: the log up to its zero, then the cubin.
  const size_t end_of_log = body.find('\0');
  return Entry{std::string(body.substr(end_of_log + 1)), std::string(body.substr(0, end_of_log))};
}

std::error_code Cache::store(const std::string& key, const Entry& entry) const {
  if (directory_ < 0) return missing_;
  const std::string body = entry.log + '\0' + entry.cubin;
  return write(key + ".cubin", std::string(kHeader) + digest(key, body) + body);
}

Cache::Lock Cache::lock(const std::string& key) const { return Lock(directory_, key + ".lock"); }

std::string Cache::store_log(const std::string& key, std::string_view log) const {
  if (directory_ >= 0 && !write(key + ".log", log)) return path_ + "/" + key + ".log";
  std::error_code ignored;
  std::string path =
      (std::filesystem::temp_directory_path(ignored) / "deepgemm_jax.log.XXXXXX").string();
  const int file = mkstemp(path.data());
  if (file < 0) return {};
  const bool written = write_all(file, log);
  close(file);
  return written ? path : std::string();
}

std::error_code Cache::write(const std::string& name, std::string_view bytes) const {
  const std::string temporary = unique_name(name);
  const int file =
      openat(directory_, temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file < 0) return last_error();
  // Some file systems only learn of a full disk when the data must really go there.
  std::error_code error;
  if (!write_all(file, bytes) || fsync(file) != 0) error = last_error();
  close(file);
  if (!error && renameat(directory_, temporary.c_str(), directory_, name.c_str()) != 0) {
    error = last_error();
  }
  if (error) unlinkat(directory_, temporary.c_str(), 0);
  return error;
}

Cache::Lock::Lock(int directory, std::string name)
    : directory_(directory),
      name_(std::move(name)),
      file_(openat(directory, name_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)) {
  const auto deadline = std::chrono::steady_clock::now() + kLongestWait;
  while (file_ >= 0 && flock(file_, LOCK_EX | LOCK_NB) != 0) {
    const bool held = errno == EWOULDBLOCK || errno == EINTR;
    if (held && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    } else {
      if (!held) unlinkat(directory_, name_.c_str(), 0);
      close(file_);
      file_ = -1;
    }
  }
}

Cache::Lock::~Lock() {
  if (file_ < 0) return;
  // Others may wait on this file while a newcomer locks a new one of its name. Both then find the
  // entry; if it could not be stored, each compiles, which is what there is to do anyway.
  unlinkat(directory_, name_.c_str(), 0);
  close(file_);
}

}  // namespace deepgemm::jit
