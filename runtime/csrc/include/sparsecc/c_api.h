/* sparsecc operator library: the C interface.
 *
 * The kernels know nothing of onnxruntime or TVM; those are thin shims over this file.
 * Packed weights come from an untrusted model file: *_create validates every length and
 * every index before anything is read, and reports the first violation as text.
 *
 * Packed weight format, version 1 (the same bytes as sparsecc/sparse in Python)
 * ---------------------------------------------------------------------------
 * A weight is a matrix W of `outputs` rows by `inputs` columns (y = x W^T + b). For a convolution
 * W is [Cout, Cin/groups * kh * kw], column order (cin, kh, kw).
 *
 *   layout "unstructured"  one stored value per kept weight, in row-major order
 *   layout "N:M"           as above, and every row keeps exactly N of each M consecutive columns
 *                          (the short last group of length r keeps min(N, r)); zeros may be stored
 *   layout "RxC"           blocks of R rows by C columns; grid = ceil(outputs/R) x ceil(inputs/C),
 *                          block order row-major in the grid, values [blocks][R][C]; what lies
 *                          beyond the edge of W is stored as zero and ignored
 *
 * `indices` is a stream of 4-bit gaps, low half of each byte first. A cursor starts at -1.
 * Token 15 moves the cursor by 15 and stores nothing; a token t < 15 moves it by t and places the
 * next value (block) at the cursor. t = 0 is legal only directly after a token 15. A stream of odd
 * length is completed with one token 15. Positions are linear in the grid (W itself for the first
 * two layouts), so they strictly increase; the last must lie inside the grid, and the number of
 * placed positions must equal the number of stored values (blocks).
 *
 * The type of the values is no part of the layout: float32, or 16 bits that stand for exactly one float32 each.
 *
 * Arithmetic: float32, whatever the values are stored in; sums in an order that depends on the instruction set and the number of rows.
 * A weight that is not stored is skipped, not multiplied: NaN and infinity in x reach only the
 * outputs that have a stored weight there (a dense product would spread them further). Zeros stored
 * as single weights may be skipped too; zeros inside a stored block are multiplied.
 */
#ifndef SPARSECC_C_API_H_
#define SPARSECC_C_API_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define SPARSECC_API __declspec(dllexport)
#else
#define SPARSECC_API __attribute__((visibility("default")))
#endif

#define SPARSECC_LAYOUT_VERSION 1

typedef enum {
  SPARSECC_ACT_NONE = 0,
  SPARSECC_ACT_RELU = 1,
  SPARSECC_ACT_LEAKY_RELU = 2, /* alpha: slope below zero */
  SPARSECC_ACT_CLIP = 3,       /* alpha: lower bound, beta: upper bound */
  SPARSECC_ACT_SIGMOID = 4,
  SPARSECC_ACT_TANH = 5,
  SPARSECC_ACT_GELU = 6,      /* 0.5 x (1 + erf(x / sqrt 2)) */
  SPARSECC_ACT_GELU_TANH = 7, /* tanh approximation */
  SPARSECC_ACT_SILU = 8,      /* x sigmoid(x) */
  SPARSECC_ACT_HARD_SWISH = 9 /* x max(0, min(1, x / 6 + 0.5)) */
} sparsecc_activation;

/* How a weight's values are stored. */
typedef enum {
  SPARSECC_FLOAT32 = 0,
  SPARSECC_FLOAT16 = 1, /* IEEE 754 binary16 */
  SPARSECC_BFLOAT16 = 2 /* the upper half of a float32 */
} sparsecc_value_type;

typedef struct {
  size_t struct_size;     /* sizeof(sparsecc_weight_desc): lets the structure grow */
  int32_t layout_version; /* SPARSECC_LAYOUT_VERSION */
  const char* layout;
  int64_t outputs, inputs;
  const void* values;  /* of value_type; need not be aligned */
  int64_t value_count; /* numbers, i.e. blocks * R * C for block layouts */
  const uint8_t* indices;
  int64_t index_bytes;
  const float* bias; /* [outputs] or NULL */
  sparsecc_activation activation;
  float alpha, beta;
  const char* isa; /* one of sparsecc_isas(), or NULL: $SPARSECC_ISA, else the best here */
  int32_t value_type; /* sparsecc_value_type */
} sparsecc_weight_desc;

typedef struct {
  int64_t groups;
  int64_t kernel[2], stride[2], dilation[2];
  int64_t pad_begin[2], pad_end[2];
} sparsecc_conv_geometry;

/* How the caller lends threads: run fn(arg, 0..tasks-1), in any order, and return when all are done.
 * NULL executor: the calling thread does everything. */
typedef struct {
  void* context;
  int32_t threads; /* how many can run at once; a hint for cutting the work */
  void (*parallel_for)(void* context, int64_t tasks, void (*fn)(void* arg, int64_t task), void* arg);
} sparsecc_executor;

typedef struct sparsecc_matmul sparsecc_matmul; /* immutable after creation: safe to share */
typedef struct sparsecc_conv sparsecc_conv;

/* Each returns 0, or non-zero with a one-line message in error (always terminated). */
SPARSECC_API int sparsecc_matmul_create(const sparsecc_weight_desc* weight, sparsecc_matmul** out,
                                        char* error, size_t error_size);
/* y[rows, outputs] = act(x[rows, inputs] W^T + bias); rows may be 0. x and y row-major, no overlap. */
SPARSECC_API int sparsecc_matmul_run(const sparsecc_matmul* op, const float* x, int64_t rows, float* y,
                                     const sparsecc_executor* executor, char* error, size_t error_size);
SPARSECC_API void sparsecc_matmul_destroy(sparsecc_matmul* op);

SPARSECC_API int sparsecc_conv_create(const sparsecc_weight_desc* weight,
                                      const sparsecc_conv_geometry* geometry, sparsecc_conv** out,
                                      char* error, size_t error_size);
/* out_hw[2] of an input height and width; error if the kernel does not fit. */
SPARSECC_API int sparsecc_conv_output_size(const sparsecc_conv* op, const int64_t in_hw[2],
                                           int64_t out_hw[2], char* error, size_t error_size);
/* NCHW in, NCHW out. channels must be groups * inputs / (kh * kw). */
SPARSECC_API int sparsecc_conv_run(const sparsecc_conv* op, const float* x, int64_t batch,
                                   int64_t channels, int64_t height, int64_t width, float* y,
                                   const sparsecc_executor* executor, char* error, size_t error_size);
/* The same with `added`, laid out as y, under the activation: y = act(conv(x) + bias + added). No overlap. */
SPARSECC_API int sparsecc_conv_add_run(const sparsecc_conv* op, const float* x, const float* added,
                                       int64_t batch, int64_t channels, int64_t height, int64_t width,
                                       float* y, const sparsecc_executor* executor, char* error,
                                       size_t error_size);
SPARSECC_API void sparsecc_conv_destroy(sparsecc_conv* op);

/* Products of bytes: y = act(x W^T + bias) with W[n][k] = scales[n] * values, values int8 in any layout.
 * x is quantised inside, over the whole of one call, as ONNX's DynamicQuantizeLinear does it: uint8 with a
 * zero point, exactly its integers. Sums are 32-bit integers modulo 2^32, exactly those of MatMulInteger;
 * float32 only begins when they are scaled: act(float(sum) * (scale of x * scales[n]) + bias[n]).
 * NaN or infinity anywhere in x makes every result NaN (before the activation): the scale is shared. */
typedef struct {
  size_t struct_size;     /* sizeof(sparsecc_int8_weight_desc) */
  int32_t layout_version; /* SPARSECC_LAYOUT_VERSION */
  const char* layout;
  int64_t outputs, inputs;
  const int8_t* values;
  int64_t value_count;
  const uint8_t* indices;
  int64_t index_bytes;
  const float* scales; /* [outputs], finite and positive */
  const float* bias;   /* [outputs] or NULL */
  sparsecc_activation activation;
  float alpha, beta;
  const char* isa; /* one of sparsecc_int8_isas(), or the name of a kernel from sparsecc_int8_kernel_table(), or
                      NULL: $SPARSECC_ISA, else the best here */
} sparsecc_int8_weight_desc;

typedef struct sparsecc_int8_matmul sparsecc_int8_matmul; /* immutable after creation: safe to share */

SPARSECC_API int sparsecc_int8_matmul_create(const sparsecc_int8_weight_desc* weight,
                                             sparsecc_int8_matmul** out, char* error, size_t error_size);
/* As sparsecc_matmul_run. */
SPARSECC_API int sparsecc_int8_matmul_run(const sparsecc_int8_matmul* op, const float* x, int64_t rows,
                                          float* y, const sparsecc_executor* executor, char* error,
                                          size_t error_size);
/* The same with x = x_scale * (byte - x_zero_point) given, finite and positive and 0..255: x is quantised as
 * QuantizeLinear does it (infinity saturates, NaN becomes byte 0), or is in bytes already. */
SPARSECC_API int sparsecc_int8_matmul_run_given(const sparsecc_int8_matmul* op, const float* x, int64_t rows,
                                                float x_scale, int32_t x_zero_point, float* y,
                                                const sparsecc_executor* executor, char* error,
                                                size_t error_size);
SPARSECC_API int sparsecc_int8_matmul_run_bytes(const sparsecc_int8_matmul* op, const uint8_t* x,
                                                int64_t rows, float x_scale, int32_t x_zero_point, float* y,
                                                const sparsecc_executor* executor, char* error,
                                                size_t error_size);
SPARSECC_API void sparsecc_int8_matmul_destroy(sparsecc_int8_matmul* op);

/* Instruction sets for products of bytes; "avx512amx", "avx512vnni", "avxvnni", "neon_dotprod" and "neon_i8mm" have dot
 * or matrix products of bytes, the plain names do without. For all other operators each counts as the plain set it extends. */
SPARSECC_API const char* sparsecc_int8_isas(void);
/* The one that most of so many rows run on. */
SPARSECC_API const char* sparsecc_int8_matmul_kernel(const sparsecc_int8_matmul* op, int64_t rows);
SPARSECC_API const char* sparsecc_int8_kernel_table(void); /* as sparsecc_kernel_table */

/* ---- recurrent operators -------------------------------------------------------------------------------
 * LSTM and GRU of ONNX with the default activations (sigmoid, tanh, tanh), no clip, no peepholes, layout 0.
 * Gates stand in the order of ONNX: LSTM input, output, forget, cell (4); GRU update, reset, hidden (3). */
typedef enum { SPARSECC_LSTM = 0, SPARSECC_GRU = 1 } sparsecc_cell;
typedef enum {
  SPARSECC_FORWARD = 0,
  SPARSECC_REVERSE = 1,
  SPARSECC_BIDIRECTIONAL = 2 /* two directions, forward first */
} sparsecc_direction;

typedef struct {
  size_t struct_size; /* sizeof(sparsecc_recurrent_desc) */
  int32_t cell;       /* sparsecc_cell */
  int32_t direction;  /* sparsecc_direction */
  int32_t linear_before_reset; /* GRU: 0 or 1 */
  int64_t hidden;
  /* The packed W as a matrix [directions * gates * hidden, inputs] and R as one of `hidden` columns; no bias, no
   * activation, blocks of a number of rows that divides `hidden`. The two may differ in layout. */
  sparsecc_weight_desc input_weight, state_weight;
  const float* bias; /* [directions][2][gates * hidden]: of W, then of R; NULL is zeros */
  const char* isa;   /* as in sparsecc_weight_desc; that of the two weights is not looked at */
} sparsecc_recurrent_desc;

/* Everything row-major: x [steps][batch][inputs], y [steps][directions][batch][hidden], states
 * [directions][batch][hidden]. */
typedef struct {
  size_t struct_size; /* sizeof(sparsecc_recurrent_io) */
  const float* x;
  int64_t steps, batch;
  const int32_t* lengths;  /* [batch], each 0..steps: what lies beyond counts as not there; NULL: all steps */
  const float* initial_h;  /* NULL: zeros */
  const float* initial_c;  /* LSTM; NULL: zeros */
  float *y, *y_h, *y_c;    /* y beyond the length of a row is zero, and so are the last states of a row of
                            * length 0, as in onnxruntime; y_c: LSTM only */
} sparsecc_recurrent_io;

typedef struct sparsecc_recurrent sparsecc_recurrent; /* immutable after creation: safe to share */

SPARSECC_API int sparsecc_recurrent_create(const sparsecc_recurrent_desc* desc, sparsecc_recurrent** out,
                                           char* error, size_t error_size);
SPARSECC_API int sparsecc_recurrent_run(const sparsecc_recurrent* op, const sparsecc_recurrent_io* io,
                                        const sparsecc_executor* executor, char* error, size_t error_size);
SPARSECC_API void sparsecc_recurrent_destroy(sparsecc_recurrent* op);
/* The kernel of the cell, and those of its products at one row of x, separated by spaces. */
SPARSECC_API const char* sparsecc_recurrent_kernels(const sparsecc_recurrent* op);
SPARSECC_API const char* sparsecc_recurrent_kernel_table(void); /* as sparsecc_kernel_table; cells only */

/* Space-separated names usable on this machine, best first, e.g. "avx512 avx2 generic". */
SPARSECC_API const char* sparsecc_isas(void);
/* The kernel an op would run for that many rows (matmul) or pixels (conv), for reports and tests. */
SPARSECC_API const char* sparsecc_matmul_kernel(const sparsecc_matmul* op, int64_t rows);
SPARSECC_API const char* sparsecc_conv_kernel(const sparsecc_conv* op);
/* Every kernel this machine can run, one line each: "name isa tile". */
SPARSECC_API const char* sparsecc_kernel_table(void);
/* The same of kernels for weights in bfloat16 on tile registers. They run where sparsecc_weight_desc.isa (or
 * $SPARSECC_ISA, or the machine) is "avx512amx"; arithmetic is float32 there too. */
SPARSECC_API const char* sparsecc_tile_kernel_table(void);
/* Every operator of the onnxruntime library, one line each: "name input-types -> output-types". */
SPARSECC_API const char* sparsecc_operator_table(void);
SPARSECC_API const char* sparsecc_version(void);

/* ---- quad planes -----------------------------------------------------------------------------------------
 * A tensor of bytes uint8 [batch][ceil(channels / 4)][height][width][4] with one scale and zero point: the four
 * channels of a pixel are one 32-bit word, the pixels of a plane follow each other. Channels beyond the last
 * hold anything. A value is scale * (stored - zero_point); to store one, it is divided by the scale, rounded
 * to the nearest integer (ties to even) and saturated, as ONNX's QuantizeLinear does it. */

/* From 32-bit sums to bytes: z = x_scale * scales[n] * sum + bias[n] (+ the residual's value), then
 * y = round(z / y_scale) + y_zero_point, saturated to low..high, which is where an activation such as Relu
 * goes. Sums are exact, modulo 2^32; the rest is float32 in another order than DequantizeLinear, Conv, Add,
 * QuantizeLinear, so that a result near the middle between two integers may be the other one of the two. */
typedef struct {
  size_t struct_size; /* sizeof(sparsecc_plane_quantization) */
  float x_scale, y_scale;
  uint8_t x_zero_point, y_zero_point;
  uint8_t low, high;
  int32_t has_residual; /* 0: the three below do not count */
  float residual_scale;
  uint8_t residual_zero_point;
} sparsecc_plane_quantization;

typedef struct sparsecc_plane_conv sparsecc_plane_conv; /* safe to share */

/* The columns of the weight are in the order (kh, kw, cin), so that four consecutive ones are four channels;
 * its activation must be SPARSECC_ACT_NONE. Blocks may have any shape; those of 8 or 16 outputs by 4 channels
 * are what the kernels hold. */
SPARSECC_API int sparsecc_plane_conv_create(const sparsecc_int8_weight_desc* weight,
                                            const sparsecc_conv_geometry* geometry,
                                            const sparsecc_plane_quantization* quantization,
                                            sparsecc_plane_conv** out, char* error, size_t error_size);
SPARSECC_API int sparsecc_plane_conv_output_size(const sparsecc_plane_conv* op, const int64_t in_hw[2],
                                                 int64_t out_hw[2], char* error, size_t error_size);
/* Quad planes in and out. residual, laid out as y, must be given where the quantization has one. */
SPARSECC_API int sparsecc_plane_conv_run(const sparsecc_plane_conv* op, const uint8_t* x, int64_t batch,
                                         int64_t height, int64_t width, const uint8_t* residual, uint8_t* y,
                                         const sparsecc_executor* executor, char* error, size_t error_size);
SPARSECC_API void sparsecc_plane_conv_destroy(sparsecc_plane_conv* op);
SPARSECC_API const char* sparsecc_plane_conv_kernel(const sparsecc_plane_conv* op);
SPARSECC_API const char* sparsecc_plane_kernel_table(void); /* as sparsecc_kernel_table */

/* Float planes [batch][channels][pixels] to quad planes and back. isa as in the descriptors. */
SPARSECC_API int sparsecc_planes_quantize(const float* x, int64_t batch, int64_t channels, int64_t pixels,
                                          float scale, uint8_t zero_point, uint8_t* y, const char* isa,
                                          const sparsecc_executor* executor, char* error, size_t error_size);
SPARSECC_API int sparsecc_planes_dequantize(const uint8_t* x, int64_t batch, int64_t channels, int64_t pixels,
                                            float scale, uint8_t zero_point, float* y, const char* isa,
                                            const sparsecc_executor* executor, char* error,
                                            size_t error_size);
/* y = a + b over bytes in any layout; x is a, the residual is b. */
SPARSECC_API int sparsecc_planes_add(const uint8_t* a, const uint8_t* b, int64_t bytes,
                                     const sparsecc_plane_quantization* quantization, uint8_t* y,
                                     const char* isa, const sparsecc_executor* executor, char* error,
                                     size_t error_size);
/* Concat along the channels: in every image the bytes of a and behind them those of b, stored as y; x is a, the
 * residual is b. `a_bytes` and `b_bytes` are of one image. */
SPARSECC_API int sparsecc_planes_concat(const uint8_t* a, int64_t a_bytes, const uint8_t* b, int64_t b_bytes,
                                        int64_t batch, const sparsecc_plane_quantization* quantization,
                                        uint8_t* y, const char* isa, const sparsecc_executor* executor,
                                        char* error, size_t error_size);
/* MaxPool of `planes` quad planes; a pad must be smaller than the kernel. out_hw as of a convolution. */
SPARSECC_API int sparsecc_planes_max_pool(const uint8_t* x, int64_t planes, int64_t height, int64_t width,
                                          const sparsecc_conv_geometry* geometry, uint8_t* y, const char* isa,
                                          const sparsecc_executor* executor, char* error, size_t error_size);
SPARSECC_API int sparsecc_planes_output_size(const sparsecc_conv_geometry* geometry, const int64_t in_hw[2],
                                             int64_t out_hw[2], char* error, size_t error_size);
/* The mean of every channel of every plane, one quad a plane. */
SPARSECC_API int sparsecc_planes_mean(const uint8_t* x, int64_t planes, int64_t pixels,
                                      const sparsecc_plane_quantization* quantization, uint8_t* y,
                                      const char* isa, const sparsecc_executor* executor, char* error,
                                      size_t error_size);
/* ---- attention and normalisation ---- */

/* y = softmax(scale * q k^T + mask) v for every head. Head h of row s of batch b starts at
 * q[b * q_strides[0] + s * q_strides[1] + h * q_strides[2]] and is contiguous; the same for k, v and y, but that
 * heads / kv_heads neighbouring heads of q share one of k and v. With cosines, q and k are turned first: z becomes
 * z * cos + w * sin, where w is the second half of z, negated, and behind it the first. */
typedef struct {
  size_t struct_size; /* sizeof(sparsecc_attention_desc) */
  int64_t batch, heads, kv_heads, queries, keys, head_size;
  float scale;
  const float *q, *k, *v;
  int64_t q_strides[3], k_strides[3], v_strides[3]; /* of batch, row and head, in floats, not negative */
  const float *cosines, *sines; /* [head_size] for each row of q, as many as of k; or both NULL */
  int64_t rotary_strides[2];    /* of batch and row */
  const float* mask;                                /* or NULL */
  int64_t mask_strides[4];                          /* of batch, head, query and key; the last is 0 or 1 */
  float* y;
  int64_t y_strides[3];
  const char* isa; /* one of sparsecc_isas(), or NULL: $SPARSECC_ISA, else the best here */
} sparsecc_attention_desc;

/* y must not overlap the others. Without keys y is 0. NaN in a query, or in the keys, makes the whole row NaN, but
 * keys (and values) whose mask is -1e30 or less, for rows that have others, may be left out. */
SPARSECC_API int sparsecc_attention_run(const sparsecc_attention_desc* attention,
                                        const sparsecc_executor* executor, char* error, size_t error_size);

/* Rows of `size`: z = x + residual; y = (z - mean) / sqrt(variance + epsilon) * gain + shift if centred, else
 * y = z / sqrt(mean square + epsilon) * gain + shift. */
typedef struct {
  size_t struct_size; /* sizeof(sparsecc_norm_desc) */
  int64_t rows, size;
  int32_t centred;
  float epsilon;
  const float* x;
  const float* residual; /* [residual_rows, size], or NULL; begins again when it is used up */
  int64_t residual_rows;
  const float* gain;  /* [size] */
  const float* shift; /* [size] or NULL */
  float* y;
  float* sum;      /* receives z, or NULL */
  const char* isa; /* as above */
} sparsecc_norm_desc;

/* y and sum must not overlap the others. */
SPARSECC_API int sparsecc_norm_run(const sparsecc_norm_desc* norm, const sparsecc_executor* executor,
                                   char* error, size_t error_size);

/* y[rows, size] = act(x[:, :size]) * x[:, size:] for rows of 2 * size, no overlap. The activation takes no
 * parameters: leaky relu and clip are refused. */
SPARSECC_API int sparsecc_gate_run(const float* x, int64_t rows, int64_t size, sparsecc_activation activation,
                                   const char* isa, float* y, const sparsecc_executor* executor, char* error,
                                   size_t error_size);

/* Every kernel for these that this machine can run, one line each: "name isa tile". */
SPARSECC_API const char* sparsecc_transformer_kernel_table(void);

/* How evenly an operator's work is dealt, from the stored weights alone: the largest part over the mean part when
 * it is cut for `parts` threads (rounded up to a power of two, at most 64). 1 is perfect. Where single weights meet
 * many rows of x those are cut too, and parts are threads of which each takes the next task when it is free. For
 * other weights this is the worst case: few rows. rows as in sparsecc_matmul_kernel, since kernels deal different
 * units. */
SPARSECC_API double sparsecc_matmul_balance(const sparsecc_matmul* op, int64_t rows, int64_t parts);
SPARSECC_API double sparsecc_int8_matmul_balance(const sparsecc_int8_matmul* op, int64_t parts);

#ifdef __cplusplus
}
#endif
#endif
