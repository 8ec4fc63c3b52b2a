#include "options.h"

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>

#include "error.h"

namespace sparsecc::run {
namespace {

namespace fs = std::filesystem;

constexpr const char* kLibraryFile = "libsparsecc_ops.so";
constexpr int kLargestNumber = 1000000000;

constexpr const char* kHelp =
    R"(Usage: sparsecc-run MODEL --input [NAME=]X.npy [OPTION]...

Run an ONNX model on arrays, without Python, and say how long it took.

  --input [NAME=]FILE.npy   an input; NAME may be left out where there is one. Repeat for more
  --output [NAME=]FILE.npy  write an output there. Repeat for more
  --repeat N                runs that are timed (10)
  --warmup N                runs before those (1)
  --threads N               threads of the model; 0: onnxruntime's choice (0)
  --library FILE            operator library; otherwise SPARSECC_OPS_LIBRARY, or libsparsecc_ops.so beside this
                            program or in ../lib from there
  --no-library              standard operators only
  --onnxruntime FILE        onnxruntime's library; otherwise SPARSECC_ONNXRUNTIME, or libonnxruntime.so beside this
                            program, in ../lib or where the system has it
  --json                    print one JSON document
  --version, --help

Exit codes: 0 done, 1 internal error, 2 wrong usage or arrays, 3 the model is refused or fails, 6 a library is missing.
)";

NamedFile named_file(const std::string& text) {
  std::error_code problem;
  const size_t at = text.find('=');
  if (at == std::string::npos || fs::is_regular_file(text, problem)) return {"", text};
  return {text.substr(0, at), text.substr(at + 1)};
}

int number(const std::string& option, const std::string& text, int least) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < least || value > kLargestNumber) {
    throw Error(Exit::kUsage, option + " " + text + ": expected a number from " + std::to_string(least));
  }
  return static_cast<int>(value);
}

// What a caller names must be there; nothing else is tried instead.
std::string existing(const std::string& path, const std::string& origin) {
  std::error_code problem;
  if (!fs::is_regular_file(path, problem)) {
    throw Error(Exit::kMissing, "the file named by " + origin + " does not exist: " + path);
  }
  return fs::absolute(path).string();  // a bare name would be looked for among the system's libraries
}

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::string library_beside() {
  std::error_code problem;
  const fs::path folder = fs::read_symlink("/proc/self/exe", problem).parent_path();
  if (problem) return "";
  for (const fs::path& file : {folder / kLibraryFile, folder.parent_path() / "lib" / kLibraryFile}) {
    if (fs::is_regular_file(file, problem)) return file.string();
  }
  return "";
}

std::string find_library(const std::string& given) {
  if (!given.empty()) return existing(given, "--library");
  const std::string set = variable("SPARSECC_OPS_LIBRARY");
  return set.empty() ? library_beside() : existing(set, "SPARSECC_OPS_LIBRARY");
}

std::string find_onnxruntime(const std::string& given) {
  if (!given.empty()) return existing(given, "--onnxruntime");
  const std::string set = variable("SPARSECC_ONNXRUNTIME");
  return set.empty() ? "" : existing(set, "SPARSECC_ONNXRUNTIME");
}

}  // namespace

Options parse_options(int count, const char* const* words) {
  Options options;
  bool no_library = false;
  const std::map<std::string, std::function<void(const std::string&)>> valued = {
      {"--input", [&](const std::string& text) { options.inputs.push_back(named_file(text)); }},
      {"--output", [&](const std::string& text) { options.outputs.push_back(named_file(text)); }},
      {"--repeat", [&](const std::string& text) { options.repeat = number("--repeat", text, 1); }},
      {"--warmup", [&](const std::string& text) { options.warmup = number("--warmup", text, 0); }},
      {"--threads", [&](const std::string& text) { options.threads = number("--threads", text, 0); }},
      {"--library", [&](const std::string& text) { options.library = text; }},
      {"--onnxruntime", [&](const std::string& text) { options.onnxruntime = text; }},
  };
  const std::map<std::string, std::function<void()>> flags = {
      {"--no-library", [&] { no_library = true; }},
      {"--json", [&] { options.json = true; }},
      {"--help", [&] { options.answer = kHelp; }},
      {"-h", [&] { options.answer = kHelp; }},
      {"--version", [&] { options.answer = "sparsecc-run, version " SPARSECC_VERSION "\n"; }},
  };
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (const auto flag = flags.find(word); flag != flags.end()) {
      flag->second();
    } else if (const auto option = valued.find(word); option != valued.end()) {
      if (++i == count) throw Error(Exit::kUsage, word + " needs a value (see sparsecc-run --help)");
      option->second(words[i]);
    } else if (!word.empty() && word[0] == '-') {
      throw Error(Exit::kUsage, "no option " + word + " (see sparsecc-run --help)");
    } else if (!options.model.empty()) {
      throw Error(Exit::kUsage,
                  "more than one model: " + options.model + " and " + word + "; inputs go after --input");
    } else {
      options.model = word;
    }
  }
  if (!options.answer.empty()) return options;
  if (options.model.empty()) throw Error(Exit::kUsage, "no model given (see sparsecc-run --help)");
  if (no_library && !options.library.empty())
    throw Error(Exit::kUsage, "--library and --no-library exclude each other");
  options.library = no_library ? "" : find_library(options.library);
  options.onnxruntime = find_onnxruntime(options.onnxruntime);
  return options;
}

}  // namespace sparsecc::run
