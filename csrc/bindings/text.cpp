/* poet_megatron._text: the tokenizer's inner loop, for data_prep/native_encoder.py. */
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/encoder.h"

namespace py = pybind11;

namespace {

using poet::text::Encoder;
using poet::text::Model;
using poet::text::Normalizer;
using poet::text::Symbols;

std::string bytes_of(const py::handle& object) { return py::cast<py::bytes>(object); }

Symbols symbols_of(const py::dict& ids) {
  Symbols symbols;
  for (const auto& [text, id] : ids) symbols.add(bytes_of(text), py::cast<std::int32_t>(id));
  return symbols;
}

std::unique_ptr<Encoder> make_encoder(const py::list& pieces, const py::dict& user_defined, const py::dict& protected_symbols,
                                      const py::list& byte_ids, std::int32_t unknown_id, std::optional<float> unknown_score,
                                      const py::bytes& charsmap, bool add_dummy_prefix, bool remove_extra_whitespaces,
                                      bool whitespace_as_suffix, bool split_at_every_space) {
  Model model{{},         symbols_of(user_defined), py::cast<std::vector<std::int32_t>>(byte_ids),
              unknown_id, unknown_score,            split_at_every_space};
  if (!model.byte_ids.empty() && model.byte_ids.size() != 256) throw std::invalid_argument("byte_ids: none or 256");
  for (const py::handle& item : pieces) {
    const auto piece = py::cast<py::tuple>(item);
    model.pieces.push_back({bytes_of(piece[0]), py::cast<std::int32_t>(piece[1]), py::cast<float>(piece[2])});
  }
  Normalizer normalizer(std::string_view(charsmap), symbols_of(protected_symbols),
                        {add_dummy_prefix, remove_extra_whitespaces, whitespace_as_suffix});
  return std::make_unique<Encoder>(std::move(model), std::move(normalizer));
}

/* The UTF-8 of a string, which the string keeps. */
std::string_view utf8_of(PyObject* text) {
  Py_ssize_t bytes = 0;
  if (!PyUnicode_Check(text)) throw py::type_error("texts must be strings");
  const char* data = PyUnicode_AsUTF8AndSize(text, &bytes);
  if (data == nullptr) throw py::error_already_set(); /* UnicodeEncodeError: a lone surrogate */
  return {data, static_cast<std::size_t>(bytes)};
}

py::tuple encode(const Encoder& encoder, const py::sequence& sequence, int threads) {
  const py::tuple texts(sequence); /* holds the strings, whatever becomes of the sequence while other threads run */
  std::vector<std::string_view> views;
  views.reserve(texts.size());
  for (std::size_t i = 0; i < texts.size(); ++i) views.push_back(utf8_of(PyTuple_GET_ITEM(texts.ptr(), static_cast<Py_ssize_t>(i))));
  py::array_t<std::int64_t> offsets(static_cast<py::ssize_t>(views.size() + 1));
  std::int64_t* const ends = offsets.mutable_data();
  ends[0] = 0;
  auto ids = std::make_unique<std::vector<std::int32_t>>();
  {
    const py::gil_scoped_release released;
    encoder.encode(views, threads, ids.get(), ends + 1);
  }
  const auto count = static_cast<py::ssize_t>(ids->size());
  std::int32_t* const data = ids->data();
  const py::capsule owner(ids.release(), [](void* vector) { delete static_cast<std::vector<std::int32_t>*>(vector); });
  return py::make_tuple(py::array_t<std::int32_t>(count, data, owner), offsets);
}

}  // namespace

PYBIND11_MODULE(_text, m) {
  m.doc() = "Encoding of texts with SentencePiece's BPE and unigram models; needs no torch.";
  py::class_<Encoder>(m, "Encoder", "A model: see data_prep/native_encoder.py, which reads one from a file.")
      .def(py::init(&make_encoder), py::kw_only(), py::arg("pieces"), py::arg("user_defined"), py::arg("protected_symbols"),
           py::arg("byte_ids"), py::arg("unknown_id"), py::arg("unknown_score"), py::arg("charsmap"), py::arg("add_dummy_prefix"),
           py::arg("remove_extra_whitespaces"), py::arg("whitespace_as_suffix"), py::arg("split_at_every_space"))
      .def("encode", &encode, py::arg("texts"), py::arg("threads"),
           "Ids of all texts (int32) and where those of each begin, with the end of the last (int64). Releases the GIL.");
}
