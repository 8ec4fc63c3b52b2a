// The linear operators: every family with every activation, generated from two short tables.
// sparsecc/emit/schema.py declares the same set; tests/emit/test_schema.py compares the two.
#ifndef SPARSECC_ORT_OP_TABLE_H_
#define SPARSECC_ORT_OP_TABLE_H_

#include <array>

#include "sparsecc/c_api.h"

namespace sparsecc::ort {

// Where the scale and zero point come from with which x meets weights in bytes.
enum class Given {
  kNothing,  // from x itself
  kScale,    // two more inputs
  kBytes     // two more inputs, and x is in bytes already
};

struct Family {
  const char* name;
  bool conv;    // otherwise a matrix multiplication
  bool blocks;  // layout "RxC"; otherwise "unstructured" or "N:M"
  bool int8;    // weights in bytes with a scale per output; otherwise float32
  Given given = Given::kNothing;
  bool adds = false;  // a last input as large as the result, added before the activation
};

inline constexpr std::array<Family, 12> kFamilies{{
    {"SparseMatMul", false, false, false},
    {"SparseConv", true, false, false},
    {"SparseConvAdd", true, false, false, Given::kNothing, true},
    {"BlockSparseMatMul", false, true, false},
    {"BlockSparseConv", true, true, false},
    {"BlockSparseConvAdd", true, true, false, Given::kNothing, true},
    {"SparseMatMulInt8", false, false, true},
    {"BlockSparseMatMulInt8", false, true, true},
    {"SparseMatMulInt8Static", false, false, true, Given::kScale},
    {"BlockSparseMatMulInt8Static", false, true, true, Given::kScale},
    {"SparseMatMulInt8Bytes", false, false, true, Given::kBytes},
    {"BlockSparseMatMulInt8Bytes", false, true, true, Given::kBytes},
}};

struct Activation {
  const char* suffix;  // appended to the family's name
  sparsecc_activation kind;
};

inline constexpr std::array<Activation, 10> kActivations{{
    {"", SPARSECC_ACT_NONE},
    {"Relu", SPARSECC_ACT_RELU},
    {"LeakyRelu", SPARSECC_ACT_LEAKY_RELU},
    {"Clip", SPARSECC_ACT_CLIP},
    {"Sigmoid", SPARSECC_ACT_SIGMOID},
    {"Tanh", SPARSECC_ACT_TANH},
    {"Gelu", SPARSECC_ACT_GELU},
    {"GeluTanh", SPARSECC_ACT_GELU_TANH},
    {"Silu", SPARSECC_ACT_SILU},
    {"HardSwish", SPARSECC_ACT_HARD_SWISH},
}};

}  // namespace sparsecc::ort

#endif  // SPARSECC_ORT_OP_TABLE_H_
