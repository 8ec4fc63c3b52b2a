// sparsecc-run: runs a model on arrays in files and says how long it took. docs/deploy.md.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "backend.h"
#include "error.h"
#include "options.h"

namespace sparsecc::run {
namespace {

std::string describe(const Declared& item) {
  const std::string type = item.type == nullptr ? "not an array of numbers" : item.type->name;
  return "'" + item.name + "' (" + type + " " + shape_text(item.shape) + ")";
}

// The position of the item that the file is for.
size_t position(const std::vector<Declared>& items, const NamedFile& file, const std::string& option) {
  if (file.name.empty() && items.size() == 1) return 0;
  std::string known;
  for (size_t i = 0; i < items.size(); ++i) {
    if (!file.name.empty() && items[i].name == file.name) return i;
    known += (i == 0 ? "" : ", ") + describe(items[i]);
  }
  const std::string what = file.name.empty() ? "needs a name, " + option + " NAME=" + file.path
                                             : "names no such thing: '" + file.name + "'";
  throw Error(Exit::kUsage, option + " " + what + "; the model has " + (known.empty() ? "none" : known));
}

void require_fit(const Declared& wanted, const Array& array, const std::string& path) {
  bool fits = wanted.type == array.type && wanted.shape.size() == array.shape.size();
  for (size_t i = 0; fits && i < array.shape.size(); ++i) {
    fits = wanted.shape[i] < 0 || wanted.shape[i] == array.shape[i];
  }
  if (!fits) {
    throw Error(Exit::kUsage, path + ": " + array.type->name + " " + shape_text(array.shape) +
                                  " does not fit input " + describe(wanted));
  }
}

std::vector<Array> read_inputs(const std::vector<Declared>& items, const std::vector<NamedFile>& files) {
  std::vector<Array> arrays(items.size());
  for (const NamedFile& file : files) {
    const size_t at = position(items, file, "--input");
    if (arrays[at].type != nullptr)
      throw Error(Exit::kUsage, "--input " + describe(items[at]) + " is given twice");
    arrays[at] = read_npy(file.path);
    require_fit(items[at], arrays[at], file.path);
  }
  for (size_t i = 0; i < items.size(); ++i) {
    if (arrays[i].type == nullptr) {
      throw Error(Exit::kUsage,
                  "input " + describe(items[i]) + " is missing: give --input " + items[i].name + "=FILE.npy");
    }
  }
  return arrays;
}

// Milliseconds of every timed run.
std::vector<double> time_runs(Backend& backend, const Options& options) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  for (int i = 0; i < options.warmup + options.repeat; ++i) {
    backend.release_outputs();
    const auto begin = Clock::now();
    backend.run();
    const std::chrono::duration<double, std::milli> taken = Clock::now() - begin;
    if (i >= options.warmup) times.push_back(taken.count());
  }
  std::sort(times.begin(), times.end());
  return times;
}

double median(const std::vector<double>& sorted) {
  const size_t half = sorted.size() / 2;
  return sorted.size() % 2 == 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

std::string json_text(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    if (static_cast<unsigned char>(c) < 0x20) {
      char code[8];
      std::snprintf(code, sizeof(code), "\\u%04x", c);
      quoted += code;
    } else {
      quoted += c;
    }
  }
  return quoted + "\"";
}

void print(const Options& options, const Backend& backend, const std::vector<double>& times) {
  const std::string library = backend.library();
  if (options.json) {
    std::printf(
        "{\"model\": %s, \"median_ms\": %.6g, \"min_ms\": %.6g, \"iterations\": %zu, \"threads\": %d, "
        "\"runtime\": %s, \"library\": %s}\n",
        json_text(options.model).c_str(), median(times), times.front(), times.size(), options.threads,
        json_text(backend.runtime()).c_str(), library.empty() ? "null" : json_text(library).c_str());
    return;
  }
  const std::string threads = options.threads == 0 ? "all" : std::to_string(options.threads);
  std::printf("median %.4g ms, min %.4g ms, %zu runs, threads %s\n%s, operator library %s\n", median(times),
              times.front(), times.size(), threads.c_str(), backend.runtime().c_str(),
              library.empty() ? "none" : library.c_str());
}

void run(const Options& options) {
  const std::unique_ptr<Backend> backend = make_ort_backend(options);
  std::vector<size_t> wanted;
  for (const NamedFile& file : options.outputs)
    wanted.push_back(position(backend->outputs(), file, "--output"));
  backend->set_inputs(read_inputs(backend->inputs(), options.inputs));
  const std::vector<double> times = time_runs(*backend, options);
  for (size_t i = 0; i < wanted.size(); ++i) write_npy(backend->output(wanted[i]), options.outputs[i].path);
  print(options, *backend, times);
}

int fail(Exit code, const char* message) {
  std::string line = std::string("sparsecc-run: error: ") + message;
  std::replace(line.begin(), line.end(), '\n', ' ');
  std::fprintf(stderr, "%s\n", line.c_str());
  return static_cast<int>(code);
}

int guarded(int count, char** words) {
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // read by onnxruntime 1.31 and later when it is loaded
  try {
    const Options options = parse_options(count, words);
    if (!options.answer.empty()) {
      std::fputs(options.answer.c_str(), stdout);
    } else {
      run(options);
    }
    return static_cast<int>(Exit::kOk);
  } catch (const Error& error) {
    return fail(error.exit, error.what());
  } catch (const std::exception& error) {
    return fail(Exit::kInternal, error.what());
  }
}

}  // namespace
}  // namespace sparsecc::run

int main(int count, char** words) { return sparsecc::run::guarded(count, words); }
