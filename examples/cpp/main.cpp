// Runs the steps of a generation from an AOTInductor artifact of toma_fx, without Python.
//
//     denoise ARTIFACT INPUTS.safetensors OUTPUT [CALL]
//
// INPUTS holds the model's inputs of every step: "0/sample", "0/timestep", "1/sample", ... Of the
// calls (sizes) in ARTIFACT/manifest.json the one whose shapes these are is run, or the one that is
// named; its schedule says which program runs at which step. The first output of
// step i is written to OUTPUT.i as raw values; a line for each step goes to standard output.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

namespace {

// -- JSON: as much as manifests and the headers of safetensors files need ---------------------

struct Json {
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;  // in the order of the file
  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value = nullptr;

  const std::string& text() const { return std::get<std::string>(value); }
  double number() const { return std::get<double>(value); }
  int64_t integer() const { return static_cast<int64_t>(number()); }
  bool null() const { return std::holds_alternative<std::nullptr_t>(value); }
  const Array& array() const { return std::get<Array>(value); }
  const Object& object() const { return std::get<Object>(value); }

  const Json* find(const std::string& key) const {
    for (const auto& [name, inner] : object()) {
      if (name == key) return &inner;
    }
    return nullptr;
  }
  const Json& operator[](const std::string& key) const {
    if (const Json* inner = find(key)) return *inner;
    throw std::runtime_error("JSON has no field " + key);
  }
  std::vector<int64_t> integers() const {
    std::vector<int64_t> found;
    for (const Json& x : array()) found.push_back(x.integer());
    return found;
  }
};

class JsonReader {
 public:
  static Json read(const std::string& text) {
    JsonReader reader(text);
    Json found = reader.value();
    if (reader.peek() != '\0') reader.fail();
    return found;
  }

 private:
  explicit JsonReader(const std::string& text) : text_(text) {}

  [[noreturn]] void fail() const {
    throw std::runtime_error("not JSON at character " + std::to_string(at_));
  }
  char peek() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool accept(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) fail();
  }
  bool word(const char* expected) {
    const size_t size = std::strlen(expected);
    if (text_.compare(at_, size, expected) != 0) return false;
    at_ += size;
    return true;
  }

  Json value() {
    switch (peek()) {
      case '{': return {object()};
      case '[': return {array()};
      case '"': return {string()};
    }
    if (word("null")) return {nullptr};
    if (word("true")) return {true};
    if (word("false")) return {false};
    char* end = nullptr;
    const double number = std::strtod(text_.c_str() + at_, &end);
    const size_t stop = end - text_.c_str();
    if (stop == at_) fail();
    at_ = stop;
    return {number};
  }
  Json::Object object() {
    Json::Object found;
    expect('{');
    if (accept('}')) return found;
    do {
      peek();
      std::string key = string();
      expect(':');
      found.emplace_back(std::move(key), value());
    } while (accept(','));
    expect('}');
    return found;
  }
  Json::Array array() {
    Json::Array found;
    expect('[');
    if (accept(']')) return found;
    do found.push_back(value());
    while (accept(','));
    expect(']');
    return found;
  }
  std::string string() {
    std::string found;
    expect('"');
    while (at_ < text_.size() && text_[at_] != '"') {
      const char c = text_[at_++];
      found += c == '\\' && at_ < text_.size() ? escaped(text_[at_++]) : c;
    }
    expect('"');
    return found;
  }

  char escaped(char c) {
    if (c == 'n') return '\n';
    if (c == 't') return '\t';
    if (c != 'u') return c;
    at_ += 4;  // names are ASCII
    return '?';
  }

  const std::string& text_;
  size_t at_ = 0;
};

std::string slurp(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("can't read " + path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// -- safetensors: 8 bytes of length, a JSON header, then the tensors' memory --------------------

struct Tensors {
  std::map<std::string, at::Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"F64", at::kDouble}, {"F32", at::kFloat},   {"F16", at::kHalf}, {"BF16", at::kBFloat16},
      {"I64", at::kLong},   {"I32", at::kInt},     {"I16", at::kShort}, {"I8", at::kChar},
      {"U8", at::kByte},    {"BOOL", at::kBool},
  };
  const auto found = known.find(name);
  if (found == known.end()) throw std::runtime_error("tensors of dtype " + name);
  return found->second;
}

// Maps the file into memory: tensors are views of it, and copied only to another device.
Tensors read_tensors(const std::string& path, at::Device device) {
  std::ifstream stream(path, std::ios::binary | std::ios::ate);
  if (!stream) throw std::runtime_error("can't read " + path);
  const uint64_t total = stream.tellg();
  uint64_t header_size = 0;  // little-endian, as every machine that torch runs on
  stream.seekg(0);
  stream.read(reinterpret_cast<char*>(&header_size), sizeof header_size);
  if (!stream || header_size > total - sizeof header_size) {
    throw std::runtime_error("damaged: " + path);
  }
  std::string text(header_size, ' ');
  stream.read(text.data(), static_cast<std::streamsize>(header_size));
  const uint64_t begin = sizeof header_size + header_size;

  const at::Tensor bytes = at::from_file(
      path, /*shared=*/false, static_cast<int64_t>(total), at::TensorOptions(at::kByte));
  const Json header = JsonReader::read(text);
  Tensors found;
  if (const Json* metadata = header.find("__metadata__")) {
    for (const auto& [key, value] : metadata->object()) found.metadata[key] = value.text();
  }
  for (const auto& [name, entry] : header.object()) {
    if (name == "__metadata__") continue;
    const auto offsets = entry["data_offsets"].integers();
    if (offsets.at(0) > offsets.at(1) || begin + offsets.at(1) > total) {
      throw std::runtime_error("damaged: " + path);
    }
    const int64_t start = static_cast<int64_t>(begin) + offsets[0];
    at::Tensor x = at::from_blob(
        static_cast<char*>(bytes.data_ptr()) + start, entry["shape"].integers(),
        [bytes](void*) {}, at::TensorOptions(dtype_of(entry["dtype"].text())));
    // what is not contiguous is stored as its memory lies
    if (const auto strided = found.metadata.find("strided/" + name);
        strided != found.metadata.end()) {
      const Json form = JsonReader::read(strided->second);
      x = x.as_strided(form.array().at(0).integers(), form.array().at(1).integers());
    }
    found.tensors[name] = found.metadata.count("host/" + name) ? x : x.to(device);
  }
  return found;
}

// -- the artifact ------------------------------------------------------------------------------

std::vector<std::string> texts(const Json& list) {
  std::vector<std::string> found;
  for (const Json& x : list.array()) found.push_back(x.text());
  return found;
}

// A program with all its constants: AOTInductor reads whatever memory they point to, so that a
// package that runs without them ends the process. There is no other way to run one in here.
class Program {
 public:
  Program(const std::string& package, const Json& spec, const Tensors& weights)
      : entry_(spec["entry"].text()),
        takes_(texts(spec["takes"])),
        gives_(texts(spec["gives"])),
        instead_(spec["instead"].text()),
        loader_(std::make_unique<torch::inductor::AOTIModelPackageLoader>(package, entry_)) {
    std::unordered_map<std::string, at::Tensor> constants;
    for (const std::string& name : loader_->get_constant_fqns()) {
      const auto alias = weights.metadata.find("alias/" + entry_ + "/" + name);
      const auto stored = weights.tensors.find(
          alias == weights.metadata.end() ? name : alias->second);
      if (stored == weights.tensors.end()) {
        throw std::runtime_error("the weights file has no constant " + name);
      }
      constants.emplace(name, stored->second);
    }
    // pointers into `weights`, which outlives the programs and which all of them share
    loader_->load_constants(
        constants, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  }

  // Whether everything is kept that this kind of program takes.
  bool runnable(const std::map<std::string, at::Tensor>& kept) const {
    for (const std::string& name : takes_) {
      if (kept.find(name) == kept.end()) return false;
    }
    return true;
  }

  const std::string& instead() const { return instead_; }

  // Replaces the kept tensors that this kind of program gives, and returns the model's outputs.
  // `older` says where the value of a kept tensor goes, newer ones before older ones.
  std::vector<at::Tensor> run(
      const std::vector<at::Tensor>& inputs, const std::vector<std::array<std::string, 2>>& older,
      std::map<std::string, at::Tensor>& kept) {
    std::vector<at::Tensor> given;
    for (const at::Tensor& x : inputs) given.push_back(x.contiguous());
    for (const std::string& name : takes_) given.push_back(kept.at(name).contiguous());
    std::vector<at::Tensor> results = loader_->run(given);
    const size_t own = results.size() - gives_.size();
    const std::map<std::string, at::Tensor> before = kept;
    for (size_t i = 0; i < gives_.size(); ++i) kept[gives_[i]] = results[own + i].clone();
    std::set<std::string> changing(gives_.begin(), gives_.end());
    for (const auto& [from, to] : older) {
      if (!changing.count(from)) continue;
      if (before.count(from)) {
        kept[to] = before.at(from);
      } else if (!before.count(to)) {
        kept[to] = kept.at(from);  // no older value yet: the new one stands for it
      } else {
        continue;
      }
      changing.insert(to);
    }
    results.resize(own);
    return results;
  }

 private:
  std::string entry_;
  std::vector<std::string> takes_, gives_;
  std::string instead_;
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader_;
};

class Artifact {
 public:
  explicit Artifact(const std::string& folder)
      : folder_(folder),
        manifest_(JsonReader::read(slurp(folder + "/manifest.json"))),
        device_(manifest_["device"]["type"].text()) {
    if (manifest_["version"].integer() != 7 || manifest_["target"]["name"].text() != "aoti") {
      throw std::runtime_error("no AOTInductor artifact of version 7: " + folder);
    }
    // libtorch says "2.13.0", the artifact "2.13.0+cpu" (or "+cu130")
    const std::string made_with = manifest_["versions"]["torch"].text();
    if (made_with.substr(0, made_with.find('+')) != TORCH_VERSION) {
      throw std::runtime_error("made with torch " + made_with + ", not " + TORCH_VERSION);
    }
    weights_ = read_tensors(folder + "/weights.safetensors", device_);
  }

  // Chooses the call that inputs of a first step are of, or the one of this name, and loads its
  // programs. The weights are those of all calls.
  void choose(const std::map<std::string, at::Tensor>& given, const std::string& name) {
    std::string known;
    std::vector<const Json*> fitting;
    const auto& calls = manifest_["calls"].array();
    for (const Json& call : calls) {
      const bool meant = name.empty() ? calls.size() == 1 || fits(call, given) : call["name"].text() == name;
      known += (known.empty() ? "" : ", ") + call["name"].text();
      if (meant) fitting.push_back(&call);
    }
    if (fitting.size() != 1) {
      const std::string problem = fitting.empty() ? "the inputs are of none" : "several fit: name one";
      throw std::runtime_error(problem + " of the calls that the artifact is for: " + known);
    }
    call_ = fitting[0];
    for (const auto& [kind, spec] : (*call_)["programs"].object()) {
      programs_.try_emplace(kind, folder_ + "/" + spec["file"].text(), spec, weights_);
    }
    for (const Json& input : (*call_)["inputs"].array()) inputs_.push_back(input["tensor"]);
    for (const auto& [from, to] : (*call_)["older"].object()) older_.push_back({from, to.text()});
  }

  // Begins a generation of so many steps.
  void begin(int64_t steps) {
    begins_.clear();
    for (const Json& phase : (*call_)["schedule"]["phases"].array()) {
      begins_.push_back(count(phase["begin"], steps));
    }
    computes_.clear();
    const Json& caching = (*call_)["schedule"]["caching"];
    if (!caching.null()) computes_ = computed_steps(caching, steps);
  }

  // One step of a generation, from 0; `kept` lives from step to step.
  std::vector<at::Tensor> step(
      int64_t index, const std::map<std::string, at::Tensor>& given,
      std::map<std::string, at::Tensor>& kept) {
    std::vector<at::Tensor> inputs;
    for (const Json& spec : inputs_) {
      const std::string& name = spec["name"].text();
      const at::Tensor& x = given.at(std::to_string(index) + "/" + name);
      if (x.sizes() != at::IntArrayRef(spec["shape"].integers())) {
        throw std::runtime_error("another shape than the artifact was built for: " + name);
      }
      inputs.push_back(x);
    }
    return programs_.at(kind(index, kept)).run(inputs, older_, kept);
  }

  // Which kind of program runs at a step: the one that is due, or what stands in for it.
  std::string kind(int64_t index, const std::map<std::string, at::Tensor>& kept) const {
    std::string name = due(index);
    for (size_t tries = 0; !programs_.at(name).runnable(kept); ++tries) {
      if (tries == programs_.size()) throw std::runtime_error("no program can run");
      name = programs_.at(name).instead();
    }
    return name;
  }

  // Which kind of program is due at a step. What was to be selected in steps that do not compute
  // is selected in the next one that does.
  std::string due(int64_t index) const {
    std::string name = merging(index);
    const size_t phase = phase_at(index);
    if (!computes(index)) {
      return name == "plain" ? "cached_plain" : phases()[phase]["cached"].text();
    }
    if (name == "plain" || role(name) == "refresh") return name;
    for (int64_t i = index - 1; i >= 0 && !computes(i) && phase_at(i) == phase; --i) {
      const std::string missed = merging(i);
      if (role(missed) == "refresh") return missed;
      if (role(name) == "reuse" && missed != "plain") name = missed;
    }
    return name;
  }

  at::Device device() const { return device_; }

 private:
  // Whether the inputs of step 0 have the shapes of a call.
  static bool fits(const Json& call, const std::map<std::string, at::Tensor>& given) {
    for (const Json& input : call["inputs"].array()) {
      const auto found = given.find("0/" + input["tensor"]["name"].text());
      const auto shape = input["tensor"]["shape"].integers();
      if (found == given.end() || found->second.sizes() != at::IntArrayRef(shape)) return false;
    }
    return true;
  }

  bool computes(int64_t index) const {
    return index >= static_cast<int64_t>(computes_.size()) || computes_[index];
  }

  // Which kind of program is due where every step computes.
  std::string merging(int64_t index) const {
    const Json& schedule = (*call_)["schedule"];
    const int64_t first_step = schedule["first_step"].integer();
    const Json& last = schedule["last_step"];
    if (index < first_step || (!last.null() && index > last.integer())) return "plain";
    const size_t phase = phase_at(index);
    const auto first = texts(phases()[phase]["first"]), cycle = texts(phases()[phase]["cycle"]);
    const size_t since = static_cast<size_t>(index - std::max(first_step, begins_[phase]));
    return since < first.size() ? first[since] : cycle[(since - first.size()) % cycle.size()];
  }

  const std::vector<Json>& phases() const { return (*call_)["schedule"]["phases"].array(); }

  // The phase of a step: the last that has begun.
  size_t phase_at(int64_t index) const {
    size_t found = 0;
    for (size_t i = 1; i < begins_.size(); ++i) {
      if (begins_[i] <= index) found = i;
    }
    return found;
  }

  // What a kind of program does, whichever phase it is of: "refresh" of "refresh_1".
  static std::string role(const std::string& kind) {
    const size_t end = kind.find_last_not_of("0123456789");
    const bool later = end != 0 && end + 1 < kind.size() && kind[end] == '_';
    return later ? kind.substr(0, end) : kind;
  }

  // Which steps of a generation compute: by a mask, or one in `every`.
  static std::vector<bool> computed_steps(const Json& caching, int64_t steps) {
    if (!caching["policy"].null()) {
      throw std::runtime_error("masks of cache-dit are not known here: build with steps_mask=[...]");
    }
    const Json& mask = caching["mask"];
    if (!mask.null() && static_cast<int64_t>(mask.array().size()) != steps) {
      throw std::runtime_error("the mask is for another number of steps");
    }
    const Json& share = caching["share"];
    const std::set<int64_t> chosen = share.null() ? std::set<int64_t>{} : spread(share.number(), steps);
    const int64_t warmup = std::max<int64_t>(count(caching["warmup_steps"], steps), 1);
    const int64_t last = count(caching["last_steps"], steps);
    const int64_t interval = caching["warmup_interval"].integer();
    int64_t most = mask.null() && share.null() ? caching["every"].integer() - 1 : steps;
    if (!caching["most"].null()) most = std::min(most, caching["most"].integer());
    std::vector<bool> flags;
    int64_t row = 0;
    for (int64_t i = 0; i < steps; ++i) {
      const bool wanted = (!mask.null() && mask.array()[i].integer() != 0) || chosen.count(i);
      const bool warms_up = i < warmup && i % interval == 0;
      const bool computed = wanted || warms_up || i >= steps - last || row >= most;
      row = computed ? 0 : row + 1;
      flags.push_back(computed);
    }
    return flags;
  }

  // The first three steps, then ever fewer, the last: as many as the share says, at least four.
  static std::set<int64_t> spread(double share, int64_t steps) {
    const int64_t wanted = static_cast<int64_t>(std::floor(share * static_cast<double>(steps) + 0.5));
    const int64_t rest = std::min(std::max<int64_t>(wanted, 4), steps) - 3;
    std::set<int64_t> chosen = {0, 1, 2};
    for (int64_t j = 1; j <= rest; ++j) {
      const double part = static_cast<double>(j) / static_cast<double>(rest);
      const double far = static_cast<double>(steps - 3) * std::pow(part, 1.25);
      chosen.insert(2 + static_cast<int64_t>(std::floor(far + 0.5)));
    }
    return chosen;
  }

  // A number of steps, or a share of all.
  static int64_t count(const Json& value, int64_t steps) {
    const double number = value.number();
    return static_cast<int64_t>(number < 1 ? std::ceil(number * static_cast<double>(steps)) : number);
  }

  std::string folder_;
  Json manifest_;
  const Json* call_ = nullptr;  // of the manifest
  at::Device device_;
  Tensors weights_;  // before the programs, which point into it
  std::map<std::string, Program> programs_;
  std::vector<Json> inputs_;
  std::vector<std::array<std::string, 2>> older_;
  std::vector<int64_t> begins_;  // of the phases
  std::vector<bool> computes_;  // by step; beyond its end all do
};

void write(const std::string& path, const at::Tensor& x) {
  const at::Tensor plain = x.cpu().contiguous();
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(plain.data_ptr()), static_cast<std::streamsize>(plain.nbytes()));
  if (!file.flush()) throw std::runtime_error("can't write " + path);
}

void generate(
    const std::string& folder, const std::string& given, const std::string& out,
    const std::string& call) {
  Artifact artifact(folder);
  const Tensors inputs = read_tensors(given, artifact.device());
  int64_t steps = 0;
  for (const auto& [name, x] : inputs.tensors) {
    steps = std::max<int64_t>(steps, std::stoll(name.substr(0, name.find('/'))) + 1);
  }
  std::map<std::string, at::Tensor> kept;
  artifact.choose(inputs.tensors, call);
  artifact.begin(steps);
  for (int64_t i = 0; i < steps; ++i) {
    const std::string kind = artifact.kind(i, kept);
    const at::Tensor output = artifact.step(i, inputs.tensors, kept).at(0);
    write(out + "." + std::to_string(i), output);
    std::cout << "step " << i << " " << kind << " " << output.sizes() << " mean of magnitudes "
              << output.to(at::kDouble).abs().mean().item<double>() << std::endl;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4 && argc != 5) {
    std::cerr << "usage: denoise ARTIFACT INPUTS.safetensors OUTPUT [CALL]\n";
    return 2;
  }
  const c10::InferenceMode guard;
  std::cout.precision(9);
  try {
    generate(argv[1], argv[2], argv[3], argc == 5 ? argv[4] : "");
  } catch (const std::exception& error) {
    std::cerr << "denoise: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
