// The disk cache of compiled kernels: a folder with one file a key, which any number of processes
// read and write at once, perhaps on several machines.
//
//   <key>.cubin  an entry: a header line, a SHA-256 of what follows, the compiler's log, the cubin.
//                Written under another name, synchronised and renamed: it is there whole or not.
//   <key>.lock   held (flock) by the process that compiles, and gone when it has finished
//   <key>.log    the compiler's log of a failed compilation
//
// Code from the folder runs with the user's rights, so a folder that others could write to is
// refused. All else that can go wrong (no room, no permission, no locks, damage) costs a
// compilation and is no error.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <system_error>

namespace deepgemm::jit {

class Cache {
 public:
  struct Entry {
    std::string cubin;
    std::string log;
  };

  // Holds a key's lock until it dies. It may hold nothing: the holder may compile either way.
  class Lock {
   public:
    Lock(int directory, std::string name);
    ~Lock();
    Lock(const Lock&) = delete;

   private:
    int directory_;
    std::string name_;
    int file_;
  };

  // Opens the folder, and first makes it, for this user alone, if it is not there. An empty path is
  // no cache. Throws a sentence if anyone but this user and root could have put files there.
  explicit Cache(const std::string& path);
  ~Cache();
  Cache(const Cache&) = delete;

  // The entry of this key, unless it is missing, damaged, or some other key's.
  std::optional<Entry> load(const std::string& key) const;

  // Says why, if it could not be written.
  std::error_code store(const std::string& key, const Entry& entry) const;

  // Waits for whoever compiles this key now.
  Lock lock(const std::string& key) const;

  // Writes a failed compilation's log, here or else among temporary files, and returns its path.
  std::string store_log(const std::string& key, std::string_view log) const;

 private:
  std::error_code write(const std::string& name, std::string_view bytes) const;

  std::string path_;
  // All goes through this descriptor, so that what was checked is what is used. -1: no cache.
  int directory_ = -1;
  std::error_code missing_;  // why there is no cache, if there should be one
};

}  // namespace deepgemm::jit
